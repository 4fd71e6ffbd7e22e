"""llama.cpp for polyquant: GGUF files on their own runtime, which is not torch, under the same names."""
