"""SpQR: three bits with scales and zero points of three bits, and outliers beside them."""
