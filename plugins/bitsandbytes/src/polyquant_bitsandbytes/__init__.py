"""bitsandbytes for polyquant: NF4 and FP4 in 4 bit, LLM.int8 in 8 bit, on the fly and from checkpoints."""
