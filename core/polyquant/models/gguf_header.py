"""Reads the header of a GGUF file without trusting it: every count, length and offset is held against the file's size.

Format: ggml's docs/gguf.md, versions 2 and 3, little-endian. Nothing is allocated from a number in the file before it
is known to fit, so a lying header costs no memory.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from polyquant.errors import ModelError
from polyquant.models.gguf_types import BY_ID, TYPES, BlockType

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_NAME_BYTES = 2**16 - 1  # of a metadata key, by the format's specification
MOST_PAIRS, MOST_TENSORS = 10_000, 100_000  # of metadata, of tensors: each is looked at, and takes memory
MOST_STRINGS = 2_000_000  # of all arrays: vocabularies and merges
MAX_TEXT_BYTES = 16 * 2**20  # of a string in the metadata, such as a chat template


class Entry(NamedTuple):
    """Where one tensor lies in the file, and how it is stored."""

    name: str
    shape: tuple[int, ...]  # as torch has it: (out_features, in_features)
    type: BlockType
    start: int  # bytes from the start of the file
    nbytes: int


class Header(NamedTuple):
    """A GGUF file without its weights. An array in `metadata` is a `range` of its length."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Entry]
    string_arrays: dict[str, int]  # key -> where the first string lies, bytes from the start of the file

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def number(self, key: str) -> int | None:
        """An integer of the architecture, such as block_count; None where the file has none or one for each layer."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int) else None


def read_header(path: Path) -> Header:
    """The checked header. Raises ModelError for a file that is truncated, damaged, crafted or of an unknown type."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return _read(path, stat.st_size, stat.st_mtime_ns)


def read_strings(header: Header, key: str) -> Iterator[bytes]:
    """The strings of an array in the metadata, such as tokenizer.ggml.tokens; none where it is no such array."""
    if key in header.string_arrays:
        with header.path.open("rb") as file:
            file.seek(header.string_arrays[key])
            for _ in header.metadata[key]:
                yield file.read(int.from_bytes(file.read(8), "little"))


@lru_cache(maxsize=4)
def _read(path: Path, size: int, mtime_ns: int) -> Header:
    if size == 0:
        raise ModelError(f"{path.name} is empty; fetch it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Cursor(content, size, path).header()


class _Cursor:
    """A position in the file that refuses to leave it."""

    def __init__(self, content: Any, size: int, path: Path) -> None:
        self.content, self.size, self.path, self.at = content, size, path, 0
        self.string_arrays: dict[str, int] = {}
        self.strings_left = MOST_STRINGS

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.path.name} is not a GGUF file that can be read: {what}; fetch or write it again")

    def header(self) -> Header:
        if self.content[:4] != b"GGUF":
            raise self.fail(f"it starts with {self.content[:4]!r}")
        self.at = 4
        version = self.scalar("I")
        if version not in (2, 3):
            big = " (a big-endian file)" if version in (2 << 24, 3 << 24) else ""
            raise self.fail(f"its version is {version}{big}, 2 and 3 little-endian are supported")
        tensors, pairs = self.count("tensors", 25, MOST_TENSORS), self.count("metadata keys", 13, MOST_PAIRS)
        metadata = self.metadata(pairs)
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise self.fail("its metadata has no general.architecture")
        parts = metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise ModelError(
                f"{self.path.name} is one of {parts} parts; join them first: llama-gguf-split --merge FIRST_PART OUT"
            )
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment > 2**20 or alignment & (alignment - 1):
            raise self.fail(f"its alignment is {alignment!r}, it must be a power of two")
        rows = [self.tensor_row() for _ in range(tensors)]
        begin = -(-self.at // alignment) * alignment
        return Header(self.path, metadata, self.entries(rows, begin, alignment), self.string_arrays)

    def scalar(self, code: str) -> Any:
        length = struct.calcsize(f"<{code}")
        if length > self.size - self.at:
            raise self.fail(f"it ends at byte {self.size}, inside its header")
        (value,) = struct.unpack_from(f"<{code}", self.content, self.at)
        self.at += length
        return value

    def count(self, what: str, least_bytes: int, most: int | None = None) -> int:
        """A number of things that take at least `least_bytes` each, and of which at most so many are believed."""
        number = int(self.scalar("Q"))
        if number > (self.size - self.at) // least_bytes:
            raise self.fail(f"it claims {number} {what}, and has {self.size - self.at} bytes left")
        if most is not None and number > most:
            raise ModelError(f"{self.path.name} has {number} {what}; at most {most} are read")
        return number

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.count(f"bytes of {what}", 1)
        if limit is not None and length > limit:
            raise self.fail(f"a {what} of {length} bytes, {limit} are allowed")
        raw = self.content[self.at : self.at + length]
        self.at += length
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"a {what} is not UTF-8 ({error})") from error

    def metadata(self, pairs: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string("metadata key", MAX_NAME_BYTES)
            if key in found:
                raise self.fail(f"the metadata key {key!r} comes twice")
            found[key] = self.value(key)
        return found

    def value(self, key: str) -> Any:
        kind = self.scalar("I")
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string(f"value of {key}", MAX_TEXT_BYTES)
        if kind != ARRAY:
            raise self.fail(f"{key} has the unknown type {kind}")
        inner = self.scalar("I")
        if inner in SCALARS:
            width = struct.calcsize(f"<{SCALARS[inner]}")
            length = self.count(f"elements of {key}", width)
            self.at += length * width
        elif inner == STRING:
            length = self.count(f"strings of {key}", 8, self.strings_left)
            self.strings_left -= length
            self.string_arrays[key] = self.at
            for _ in range(length):
                size = self.count(f"bytes of a string of {key}", 1)
                self.at += size
        else:
            raise self.fail(f"{key} is an array of the unknown type {inner}")
        return range(length)  # an array's length, in a type no scalar has

    def tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("tensor name", MAX_NAME_BYTES)
        dimensions = self.scalar("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.fail(f"{name} has {dimensions} dimensions, 1 to {MAX_DIMENSIONS} are allowed")
        shape = tuple(int(self.scalar("Q")) for _ in range(dimensions))[::-1]  # ggml: fastest first
        return name, shape, self.scalar("I"), self.scalar("Q")

    def entries(
        self, rows: list[tuple[str, tuple[int, ...], int, int]], begin: int, alignment: int
    ) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for name, shape, kind, offset in rows:
            if kind not in BY_ID:
                known = ", ".join(TYPES)
                raise ModelError(f"{self.path.name}: {name} has ggml type {kind}; types that can be read: {known}")
            block = BY_ID[kind]
            if name in found:
                raise self.fail(f"the tensor {name!r} comes twice")
            if min(shape) < 1 or shape[-1] % block.elements:
                raise self.fail(f"{name} has the shape {shape}, and {block.name} blocks hold {block.elements} weights")
            nbytes = prod(shape) // block.elements * block.nbytes
            if offset % alignment or begin + offset + nbytes > self.size:
                raise self.fail(
                    f"{name} should have {nbytes} bytes at {begin + offset}, and the file has {self.size} bytes"
                )
            found[name] = Entry(name, shape, block, begin + offset, nbytes)
        ordered = sorted(found.values(), key=lambda entry: entry.start)
        for one, next_one in pairwise(ordered):
            if one.start + one.nbytes > next_one.start:
                raise self.fail(f"{one.name} and {next_one.name} overlap")
        return found
