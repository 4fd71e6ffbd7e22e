"""BitNet b1.58 for polyquant: ternary checkpoints, packed four weights a byte, with int8 activations."""
