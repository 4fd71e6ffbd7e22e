"""VPTQ, HIGGS, SpQR and EXL3 for polyquant: index streams into tables, permuted and rotated, packed on any device."""
