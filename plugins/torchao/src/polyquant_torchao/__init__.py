"""torchao for polyquant: int8, int4 and float8 weights as tensor subclasses, on the fly and from checkpoints."""
