"""Block floats for polyquant: MXFP4, MXFP8, NVFP4, NVIDIA ModelOpt's checkpoints and FP-Quant, packed on any device."""
