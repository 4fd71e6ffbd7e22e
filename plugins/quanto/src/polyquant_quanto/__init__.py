"""optimum-quanto for polyquant: int8, int4, int2 and float8 weights, on the fly and from checkpoints."""
