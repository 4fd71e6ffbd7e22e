"""The checkpoint that is converted: loaded packed, nothing rounded, with the codes of each layer. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from polyquant.errors import UnsupportedOperation
from polyquant.isolated import handles
from polyquant.loaded import LoadedModel
from polyquant.loading.load import load, reader_for
from polyquant.models.model import Model
from polyquant.modules import module_of
from polyquant.packable import KEEP, PACKED, PackableOptions
from polyquant.packed_weights.experts import RepackedExperts
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.packed_weights.vocabulary import RepackedEmbedding
from polyquant.packed_weights.weight import PackedWeight
from polyquant.plugin import checkpoints
from polyquant.types import LayerInfo


class Source(NamedTuple):
    """A loaded checkpoint, dense but for its packed layers."""

    loaded: LoadedModel
    layers: Mapping[str, RepackedLinear]  # by the names of their modules
    stacks: Mapping[str, RepackedExperts]  # by the names of the tensors that they stand for
    left: Mapping[str, LayerInfo]  # modules that are quantized, and have no place in the packed layout
    notes: tuple[str, ...]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """After the block the model has its own layers again: a target may have put others in their places."""
        try:
            yield
        finally:
            for name, module in (*self.layers.items(), *self.stacks.items()):
                self.loaded.model.set_submodule(name, module)

    def weights(self) -> Iterator[tuple[str, PackedWeight]]:
        """The packed weights, of experts each under its stack's name, one after the other."""
        for name, layer in self.layers.items():
            yield name, layer.packed
        for name, stack in self.stacks.items():
            for weight in stack.packed:
                yield name, weight


def read(model: str | Path, backend: str | None, options: Mapping[str, Any]) -> Source:
    """Raises UnsupportedOperation where the reader has no packed layout, or runs in an environment of its own."""
    backend, own = handles.written(backend, options)
    trusts = {name: own[name] for name in ("trust_remote_code", "allow_pickle") if name in own}
    found = Model.find(model, revision=own.get("revision"), progress=bool(own.get("progress")), **trusts)
    handle = handles.backend(backend or reader_for(found.source))
    if (
        handles.environment_name(handle)
        or not issubclass(handle.info.options, PackableOptions)
        or not handle.can("pack")
    ):
        where = "runs in an environment of its own" if handles.environment_name(handle) else "has no packed layout"
        able = ", ".join(info.name for info in handles.backends() if issubclass(info.options, PackableOptions))
        raise UnsupportedOperation(
            f"{handle.name} {where}, through which checkpoints are converted; name another backend that reads "
            f"{found.source.name} (--backend), of {able}, or quantize the dense model"
        )
    fields = handle.info.options.__struct_fields__
    dense: dict[str, Any] = {name: KEEP for name in ("embeddings", "head", "experts") if name in fields}
    loaded = load(model, handle.name, **{**own, **dense, "kernel": PACKED, "device": "cpu", "compute_dtype": "float32"})
    for mark in handle.info.marks:  # what says in config.json whose checkpoint it is
        if mark.key and hasattr(loaded.model.config, mark.key):
            delattr(loaded.model.config, mark.key)
    return of_loaded(loaded)


def of_loaded(loaded: LoadedModel) -> Source:
    """Of a model that was loaded with kernel='packed', embedding, head and experts kept as they are."""
    layers = {
        name: module
        for name, module in loaded.model.named_modules()
        if isinstance(module, RepackedLinear) and not module.is_tied
    }
    stacks = {name: module for name, module in loaded.model.named_modules() if isinstance(module, RepackedExperts)}
    quantized = {
        layer.name if layer.role == "experts" else module_of(layer): layer
        for layer in loaded.initial_layers
        if layer.quantized and layer.role != "embedding"
    }
    left = {name: layer for name, layer in quantized.items() if name not in layers and name not in stacks}
    return Source(loaded, layers, stacks, left, tuple(_without_packed_vocabulary(loaded)))


def _without_packed_vocabulary(loaded: LoadedModel) -> list[str]:
    """Replace quantized embeddings, with heads that are tied to them, by dense ones; notes that say so."""
    model, notes = loaded.model, list[str]()
    for name, module in list(model.named_modules()):
        if not isinstance(module, RepackedEmbedding):
            continue
        if module.embed_scale is not None:
            raise UnsupportedOperation(f"{name} is quantized, and scales what it looks up; that is not converted yet")
        weight = nn.Parameter(module.dequantize(), requires_grad=False)
        dense = nn.Embedding(*weight.shape, device="meta")
        dense.weight = weight
        model.set_submodule(name, dense)
        for other, tied in list(model.named_modules()):
            if isinstance(tied, RepackedLinear) and tied.is_tied:
                head = nn.Linear(tied.in_features, tied.out_features, bias=tied.bias is not None, device="meta")
                head.weight = weight
                if tied.bias is not None:
                    head.bias = tied.bias
                model.set_submodule(other, head)
        notes.append(
            f"{name} is quantized in the source ({module.scheme}), and dense here: the same numbers, more bytes"
        )
    return notes


@contextmanager
def narrow(loaded: LoadedModel) -> Iterator[None]:
    """In the block, dense parameters are in the fewest bits that hold their numbers: as stored, where that is so."""
    assert loaded.request is not None
    stored = getattr(torch, checkpoints.stored_dtype(loaded.request.source, "bfloat16"))
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    narrow: dict[int, nn.Parameter] = {}  # what is tied stays so
    for module in loaded.model.modules():
        for name, tensor in list(module._parameters.items()):
            is_part = isinstance(module, (RepackedLinear, RepackedExperts)) and name != "bias"
            if tensor is None or is_part or tensor.dtype != torch.float32:
                continue
            if id(tensor) not in narrow:
                narrow[id(tensor)] = nn.Parameter(narrowed(tensor.detach(), stored), requires_grad=False)
            module._parameters[name] = narrow[id(tensor)]
            before.append((module, name, tensor))
    try:
        yield
    finally:
        for module, name, tensor in before:
            module._parameters[name] = tensor


def narrowed(tensor: torch.Tensor, preferred: torch.dtype) -> torch.Tensor:
    """A float32 tensor in the preferred dtype, else another of 16 bits, where that holds it; else itself."""
    for dtype in (preferred, torch.bfloat16, torch.float16):
        if torch.equal((held := tensor.to(dtype)).float(), tensor):
            return held
    return tensor
