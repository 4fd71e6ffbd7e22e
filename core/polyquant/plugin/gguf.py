"""GGUF files for plugins: the checked header, the block types, keys of configs. Imports nothing heavy."""

from polyquant.models.gguf_fields import DESCRIBED, keys_of, rope_keys
from polyquant.models.gguf_header import Entry, Header, read_header, read_strings
from polyquant.models.gguf_types import FLOAT_DTYPES, TYPES, BlockType

__all__ = [
    "DESCRIBED", "FLOAT_DTYPES", "TYPES", "BlockType", "Entry", "Header", "keys_of", "read_header", "read_strings",
    "rope_keys",
]  # fmt: skip
