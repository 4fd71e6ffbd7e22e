"""A safetensors file of packed weights: written tensor by tensor, and mapped, so that its pages are the model's memory.

Tensors lie in the order in which they are added, one block of a model after the other, so that a block is a few spans.
Imports torch.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
import torch

from polyquant.errors import ModelError, SaveError
from polyquant.models.headers import LENGTH_BYTES, TORCH_NAMES, StoredTensor, located_tensors
from polyquant.support.files import is_full
from polyquant.support.sizes import size

DTYPES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
"""torch's names of dtypes -> those of safetensors."""
ALIGNED = 8  # bytes: what follows a tensor of a multiple of that is aligned to its numbers
ENTRY_BYTES, MOST_HEADER = 160, 16 * 2**20  # of a tensor in the header, beside its name; of all
SYNCED_BYTES = 2**26  # so much is written before it goes to the disk, and its pages may be taken back
READ_AHEAD = 2**17  # bytes: a longer request is cut to what the disk takes at once, without a word
NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE: else more than the memory cannot be mapped


class Span(NamedTuple):
    """A stretch of a file."""

    start: int
    nbytes: int


def ordered(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names in the order to add them in: as they come, and last what the alignment of others would suffer from."""
    return sorted(tensors, key=lambda name: -tensors[name].itemsize * (tensors[name].nbytes % ALIGNED != 0))


class TensorWriter:
    """Writes a file, tensor by tensor: no more than one is in memory for it. Raises SaveError where it cannot be."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        """names: at least as many and as long as those that come, for the header that is written last."""
        self._path, self._header, self._at = path, dict[str, Any](), 0
        self._room = min(MOST_HEADER, sum(len(name) + ENTRY_BYTES for name in names) + 64) // 64 * 64
        self._digest, self._synced = hashlib.sha256(), 0
        self.sha256 = ""  # once it is finished
        try:
            self._file = path.open("w+b", buffering=0)
            self._file.seek(LENGTH_BYTES + self._room)
        except OSError as error:
            raise SaveError(f"{path} cannot be written: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor behind those before it."""
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        end = self._at + tensor.nbytes
        self._header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [self._at, end]}
        if tensor.numel():
            self._write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        self._at = end

    @property
    def names(self) -> Collection[str]:
        """Of the tensors that it has."""
        return self._header.keys()

    def put_away(self, name: str, module: torch.nn.Module) -> None:
        """Write the parameters of a module, `name` in its model, and let the file's pages be them.

        One that would leave those behind it unaligned stays as it is.
        """
        own = {f"{name}.{short}": parameter for short, parameter in module._parameters.items()
               if parameter is not None and parameter.nbytes and parameter.nbytes % ALIGNED == 0}  # fmt: skip
        for each, parameter in own.items():
            self.add(each, parameter.detach())
        for each, tensor in self._mapped(own).items():
            own[each].data = tensor

    def _mapped(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Tensors that were just added, one after the other, as pages of the file."""
        if not names:
            return {}
        wanted = {name: self._header[name] for name in names}
        first = min(entry["data_offsets"][0] for entry in wanted.values())
        last = max(entry["data_offsets"][1] for entry in wanted.values())
        self._sync()
        own = MappedFile(self._path, Span(LENGTH_BYTES + self._room + first, last - first))
        return {
            name: own.tensor(
                StoredTensor(TORCH_NAMES[entry["dtype"]], tuple(entry["shape"]), 0),
                LENGTH_BYTES + self._room + entry["data_offsets"][0],
            )
            for name, entry in wanted.items()
        }

    def _write(self, content: memoryview) -> None:
        self._digest.update(content)
        with self._writing():
            while content:
                content = content[self._file.write(content) or 0 :]

    def _sync(self) -> None:
        """Have what was written on the disk, so that its pages need not stay."""
        if self._at - self._synced >= SYNCED_BYTES:
            with self._writing():
                os.fsync(self._file.fileno())
            forget(self._file.fileno(), Span(0, LENGTH_BYTES + self._room + self._at))
            self._synced = self._at

    def _finish(self) -> None:
        head = msgspec.json.encode(self._header)
        if len(head) > self._room:
            raise SaveError(
                f"{self._path}: {len(self._header)} tensors have no place in a header of {self._room} bytes"
            )
        head = self._room.to_bytes(LENGTH_BYTES, "little") + head + b" " * (self._room - len(head))
        self._file.seek(0)
        self._write(memoryview(head))
        self.sha256 = self._digest.hexdigest()
        with self._writing():
            os.fsync(self._file.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveError(f"{self._path} cannot be written: {error}{room_left(error, self._path)}") from error


def digest_of(path: Path) -> str:
    """The `sha256` of a file as its writer has it: of the tensors, and then of what is before them. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(LENGTH_BYTES)
        head += file.read(min(MOST_HEADER, int.from_bytes(head, "little")))
        digest = hashlib.file_digest(file, "sha256")
    digest.update(head)
    return digest.hexdigest()


class MappedFile:
    """Tensors of a file whose pages come into memory when they are touched; what is written to them stays here."""

    def __init__(self, path: Path, span: Span | None = None) -> None:
        """span: the stretch that is mapped; None: all. Raises OSError."""
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._seen = self._state()
        span = span or Span(0, self._seen[0])
        self._start = span.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = span.start + span.nbytes - self._start
        if hasattr(mmap, "MAP_PRIVATE"):
            self._map = mmap.mmap(
                self._file.fileno(), length, flags=mmap.MAP_PRIVATE | NO_RESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=self._start,
            )  # fmt: skip
        else:
            self._map = mmap.mmap(self._file.fileno(), length, access=mmap.ACCESS_COPY, offset=self._start)

    def tensor(self, stored: StoredTensor, start: int) -> torch.Tensor:
        """One that lies at `start`, in bytes from the file's beginning."""
        dtype, count = getattr(torch, stored.dtype), prod(stored.shape)
        if not count:
            return torch.empty(stored.shape, dtype=dtype)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=count * dtype.itemsize, offset=start - self._start)
        return raw.view(dtype).view(stored.shape)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of a whole file, by name. Raises ModelError for a header that lies."""
        return {name: self.tensor(*located) for name, located in located_tensors(self.path).items()}

    def require_unchanged(self) -> None:
        """Raises ModelError where the file was written to since: its pages would be those of another model."""
        if self._state() != self._seen:
            raise ModelError(f"{self.path} was changed while the model was read from it: load the model again")

    def read_ahead(self, spans: Iterable[Span]) -> None:
        """Have the system read stretches while something else is done. Nothing where it takes no such advice."""
        if hasattr(os, "posix_fadvise"):
            for span in spans:
                for at in range(span.start, span.start + span.nbytes, READ_AHEAD):
                    os.posix_fadvise(self._file.fileno(), at, READ_AHEAD, os.POSIX_FADV_WILLNEED)
        elif hasattr(mmap, "MADV_WILLNEED"):
            self._advise(mmap.MADV_WILLNEED, spans)

    def give_back(self, spans: Iterable[Span]) -> None:
        """Give the pages of stretches back, in this process and to the system, which is not to keep them either."""
        spans = tuple(spans)
        if hasattr(mmap, "MADV_DONTNEED"):
            self._advise(mmap.MADV_DONTNEED, spans)
        for span in spans:
            forget(self._file.fileno(), span)

    def _advise(self, advice: int, spans: Iterable[Span]) -> None:
        page = mmap.PAGESIZE
        for span in spans:  # whole pages: what lies beside a stretch may be in use
            first = -(-(span.start - self._start) // page) * page
            length = (span.start - self._start + span.nbytes) // page * page - first
            if length > 0:
                self._map.madvise(advice, first, length)

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def forget(file: int, span: Span) -> None:
    """Have the system drop its pages of a stretch of an open file. Nothing where it takes no such advice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, span.start, span.nbytes, os.POSIX_FADV_DONTNEED)


def room_left(error: OSError, path: Path) -> str:
    """Where a disk or a quota is full: how much is free, and what to do; else nothing."""
    if not is_full(error):
        return ""
    return f"; {size(shutil.disk_usage(path.parent).free)} are free there: make room, or set POLYQUANT_CACHE"
