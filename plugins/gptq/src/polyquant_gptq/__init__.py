"""GPTQ for polyquant: calibrated 2, 3, 4 and 8 bit weights, from checkpoints of gptqmodel and auto-gptq."""
