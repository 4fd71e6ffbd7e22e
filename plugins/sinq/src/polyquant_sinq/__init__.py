"""SINQ for polyquant: 2 to 8 bit weights without calibration, while loading and from checkpoints."""
