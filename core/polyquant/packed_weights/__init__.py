"""Packed weights: frozen linear layers that compute with them, and one layout for those of every format."""
