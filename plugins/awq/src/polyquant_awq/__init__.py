"""AWQ for polyquant: 4-bit weights, scaled before rounding by what calibration text activates."""
