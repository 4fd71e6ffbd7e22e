"""Fine-grained FP8 for polyquant: e4m3 weights in scaled blocks, packed in memory on any device."""
