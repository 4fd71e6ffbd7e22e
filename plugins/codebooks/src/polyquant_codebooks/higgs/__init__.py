"""HIGGS: pairs of rotated weights from a fixed grid, in the order of FLUTE's kernels."""
