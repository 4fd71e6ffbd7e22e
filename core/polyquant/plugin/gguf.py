"""GGUF files for plugins: the checked header, the block types. Imports nothing heavy."""

from polyquant.models.gguf_header import Entry, Header, read_header, read_strings
from polyquant.models.gguf_types import FLOAT_DTYPES, TYPES, BlockType

__all__ = ["FLOAT_DTYPES", "TYPES", "BlockType", "Entry", "Header", "read_header", "read_strings"]
