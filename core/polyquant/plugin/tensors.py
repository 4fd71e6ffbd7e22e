"""The tensors of a checkpoint's safetensors files, one at a time. Imports torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch
from safetensors import safe_open

from polyquant.errors import ModelError
from polyquant.models import versions
from polyquant.models.headers import StoredTensor, located_tensors
from polyquant.request import ModelSource

PIECE_WEIGHTS = 2**21  # that are read at once where they are cast: 8 MB in float32
STORED_ROWS = "stored_rows"  # attribute of a module whose weight is in the file, read as its rows are asked for
OBSOLETE = r"rotary_emb\.inv_freq$"  # older transformers stored it; it follows from the config


def read_tensors(source: ModelSource) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor in the safetensors files of `source`, one at a time, on the CPU.

    In memory of their own where that leaves as much free. Views of one mapped file keep all of its pages that were read
    resident for as long as one of them lives, beside what the others were made into.
    """
    views = source.checkpoint_bytes > psutil.virtual_memory().available / 2
    for name in source.weight_files:
        yield from (_views if views else _copies)(source.path / name)


def _views(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        for key in file.keys():  # noqa: SIM118  not a mapping
            yield key, file.get_tensor(key)


def _copies(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with path.open("rb") as file:
        for key, (stored, start) in sorted(located_tensors(path).items()):  # the order of views
            tensor = torch.empty(stored.shape, dtype=_dtype(path, key, stored))
            file.seek(start)
            _read_into(tensor, file, path, key)
            yield key, tensor


def read_tensor(
    path: Path, key: str, stored: StoredTensor, start: int, cast: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """A tensor of a file, in memory of its own, with one copy of it at a time.

    stored, start: as `located_tensors` has them. cast: gives a tensor in the dtype that is wanted; called with pieces
    of it, as stored.
    """
    own = _dtype(path, key, stored)
    dtype = cast(torch.empty(0, dtype=own)).dtype
    with path.open("rb") as file:
        file.seek(start)
        tensor = torch.empty(stored.shape, dtype=dtype)
        if own == dtype:
            _read_into(tensor, file, path, key)
            return cast(tensor)
        whole = tensor.view(-1)
        piece = torch.empty(min(PIECE_WEIGHTS, len(whole)), dtype=own)
        for first in range(0, len(whole), PIECE_WEIGHTS):
            part = piece[: len(whole) - first]
            _read_into(part, file, path, key)
            whole[first : first + len(part)] = cast(part)
    return tensor


class StoredRows:
    """A tensor of a file, of which rows are read when they are asked for, into memory of their own."""

    device = torch.device("cpu")

    def __init__(
        self, path: Path, key: str, stored: StoredTensor, start: int, cast: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """As `read_tensor` takes them."""
        self.path, self.key, self.stored, self.start, self.cast = path, key, stored, start, cast
        self.shape = torch.Size(stored.shape)
        self._own = _dtype(path, key, stored)
        self.dtype = cast(torch.empty(0, dtype=self._own)).dtype

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """(rows, ...), in the dtype of `cast`."""
        first, last, _ = rows.indices(self.shape[0])
        piece = torch.empty((max(0, last - first), *self.shape[1:]), dtype=self._own)
        with self.path.open("rb") as file:
            file.seek(self.start + first * prod(self.shape[1:]) * piece.itemsize)
            _read_into(piece, file, self.path, self.key)
        return self.cast(piece)


def _dtype(path: Path, key: str, stored: StoredTensor) -> torch.dtype:
    dtype: torch.dtype | None = getattr(torch, stored.dtype, None)
    if dtype is None:
        raise ModelError(f"{path.name}: {key} is {stored.dtype}, for which torch has no dtype")
    return dtype


def _read_into(tensor: torch.Tensor, file: BinaryIO, path: Path, key: str) -> None:
    if file.readinto(tensor.view(-1).view(torch.uint8).numpy()) != tensor.nbytes:  # type: ignore[attr-defined]
        raise ModelError(f"{path.name} ended while {key} was read; fetch or write it again")


def own_tensors(model: Any, source: ModelSource) -> Iterator[tuple[str, torch.Tensor]]:
    """`read_tensors` without those that are tied, that the model computes, or that transformers leaves out too."""
    patterns, own = [*(model._keys_to_ignore_on_load_unexpected or ()), OBSOLETE], model.state_dict().keys()
    computed = {name for name, _ in model.named_buffers()} - own
    left_out = {*versions.tied_tensors(model), *computed}
    for name, tensor in read_tensors(source):
        if name not in left_out and (name in own or not any(re.search(pattern, name) for pattern in patterns)):
            yield name, tensor


def packed_modules(source: ModelSource, parts: tuple[str, ...]) -> set[str]:
    """Names of the modules that have a tensor called like one of `parts`; no weight is read."""
    names: set[str] = set()
    for name in source.weight_files:
        with safe_open(source.path / name, framework="pt", device="cpu") as file:
            split = (key.rpartition(".") for key in file.keys())  # noqa: SIM118  not a mapping
            names.update(module for module, _, part in split if part in parts)
    return names
