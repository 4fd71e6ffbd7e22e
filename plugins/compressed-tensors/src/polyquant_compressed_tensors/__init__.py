"""compressed-tensors for polyquant: checkpoints of llm-compressor (int4, int8, fp8, mxfp4, nvfp4), kept packed."""
