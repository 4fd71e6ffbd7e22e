"""EXL3: rotated weights as states of a trellis, from a table that is computed."""
