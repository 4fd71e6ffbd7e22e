"""Backends in environments of their own: making these, and using a backend there as if it were here."""
