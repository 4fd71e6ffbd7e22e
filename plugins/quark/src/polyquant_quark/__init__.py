"""AMD Quark for polyquant: its int4, uint4, int8, fp8 and mxfp4 checkpoints, kept packed, and made with amd-quark."""
