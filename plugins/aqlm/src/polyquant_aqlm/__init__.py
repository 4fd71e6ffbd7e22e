"""AQLM for polyquant: checkpoints of additive codebooks, read and run packed."""
