"""HQQ for polyquant: 1, 2, 3, 4 and 8 bit weights without calibration, while loading and from checkpoints."""
