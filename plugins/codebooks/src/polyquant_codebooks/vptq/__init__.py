"""VPTQ: vectors of weights from learned tables, by groups of columns."""
