"""GPTQ and AWQ for polyquant through gptqmodel: calibrated weights of 2, 3, 4 and 8 bit, made and read."""
