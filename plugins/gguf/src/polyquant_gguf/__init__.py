"""GGUF for polyquant: llama.cpp's files and block types in plain torch, packed in memory, on CPU and GPU."""
