"""Reads the header of a GGUF file without trusting it: every count, length and offset is held against the file's size.

Format: ggml's docs/gguf.md, versions 2 and 3, little-endian. Nothing is allocated from a number in the file before it
is known to fit, so a lying header costs no memory. A model may lie in several files, whose tensors are read as one's.
"""

from __future__ import annotations

import mmap
import re
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


_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MOST_PARTS = 1000


class Entry(NamedTuple):
    """Where one tensor lies in the file, and how it is stored."""

    name: str
    shape: tuple[int, ...]  # as torch has it: (out_features, in_features)
    type: BlockType
    start: int  # bytes from the start of the file
    nbytes: int
    path: Path  # the file


class Header(NamedTuple):
    """A GGUF file without its weights. An array in `metadata` is a `range` of its length."""

    path: Path  # of several parts, the first
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
    """The checked header, of all parts of a split file by the first one.

    Raises ModelError for a file that is truncated, damaged, crafted or of an unknown type, and where a part is missing.
    """
    try:
        stats = [(part, part.stat()) for part in parts_of(path)]
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return _whole(tuple((part, stat.st_size, stat.st_mtime_ns) for part, stat in stats))


def parts_of(path: Path) -> list[Path]:
    """The files of a model by the path of its first one: by their names, which llama.cpp goes by too.

    Raises ModelError for a later part, and where one is missing.
    """
    named = _PART.fullmatch(path.name)
    if named is None:
        return [path]
    count = int(named["count"])
    names = [f"{named['stem']}-{number:05}-of-{named['count']}.gguf" for number in range(1, min(count, MOST_PARTS) + 1)]
    if path.name != names[0]:
        raise ModelError(f"{path.name} is one of {count} parts: give the first, {path.with_name(names[0])}")
    parts = [path.with_name(name) for name in names]
    if missing := [part.name for part in parts if not part.exists()]:
        raise ModelError(
            f"{path.name} is one of {count} parts, and {len(missing)} of them are not beside it: "
            f"{', '.join(missing[:3])}; fetch all of them"
        )
    return parts


@lru_cache(maxsize=4)
def _whole(parts: tuple[tuple[Path, int, int], ...]) -> Header:
    """Of parts that are those of one file: (path, size, time) of each."""
    first, *others = (_read(*part) for part in parts)
    tensors = dict(first.tensors)
    for number, part in enumerate((first, *others)):
        said = part.metadata.get("split.count", 0), part.metadata.get("split.no", 0)
        if said != ((len(parts), number) if said[0] or others else (0, 0)):
            raise ModelError(
                f"{part.path.name} says that it is part {said[1]} of {said[0]}, and its name that it is {number} of "
                f"{len(parts)}, both from 0; fetch the parts under their own names, such as MODEL-00001-of-00003.gguf"
            )
        if number and (twice := sorted(set(tensors) & set(part.tensors))):
            raise ModelError(f"{part.path.name}: the tensor {twice[0]} is in another part already; fetch it again")
        tensors |= part.tensors
    if not isinstance(first.metadata.get("general.architecture"), str):
        raise ModelError(
            f"{first.path.name} is not a GGUF file that can be read: its metadata has no general.architecture; "
            "fetch or write it again"
        )
    if (total := first.metadata.get("split.tensors.count", len(tensors))) != len(tensors):
        raise ModelError(f"{first.path.name}: its parts hold {len(tensors)} tensors of {total}; fetch them again")
    return first._replace(tensors=tensors)


def read_strings(header: Header, key: str) -> Iterator[bytes]:
    """The strings of an array in the metadata, such as tokenizer.ggml.tokens; none where it is no such array."""
    if key in header.string_arrays:
        with header.path.open("rb") as file:
            file.seek(header.string_arrays[key])
            for _ in header.metadata[key]:
                yield file.read(int.from_bytes(file.read(8), "little"))


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
            found[name] = Entry(name, shape, block, begin + offset, nbytes, self.path)
        ordered = sorted(found.values(), key=lambda entry: entry.start)
        for one, next_one in pairwise(ordered):
            if one.start + one.nbytes > next_one.start:
                raise self.fail(f"{one.name} and {next_one.name} overlap")
        return found
