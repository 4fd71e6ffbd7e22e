"""Writes layers that were unpacked as safetensors, shard after shard, with all that belongs to a checkpoint.

For the hook `write_unpacked` of formats that need something besides. Imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from polyquant.loaded import LoadedModel
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.plugin import checkpoints

SHARD_BYTES = 2**30
INDEX = "{}.safetensors.index.json"
METADATA = {"format": "pt"}


def write(
    loaded: LoadedModel, layers: Iterable[tuple[str, Mapping[str, Tensor]]], out: Path, *,
    metadata: Mapping[str, str] = METADATA,
) -> Path:  # fmt: skip
    """The checkpoint of a model whose layers are `layers`, and whose other tensors are its own.

    loaded: with the options of the checkpoint. metadata: of the files. Tensors are written as they come: at most a
    shard of them is held. Returns `out`.
    """
    assert loaded.request is not None
    _write_shards(_tensors(loaded.model, layers), out, _stem(loaded), dict(metadata))
    config = loaded.model.config.__class__.from_dict(loaded.model.config.to_dict())
    config.quantization_config = loaded.config.to_stored()
    config.architectures = [type(loaded.model).__name__]
    config.dtype = getattr(torch, checkpoints.stored_dtype(loaded.request.source, "bfloat16"))
    config.save_pretrained(out)
    if loaded.model.can_generate():
        loaded.model.generation_config.save_pretrained(out)
    loaded.tokenizer.save_pretrained(out)
    return out


def _stem(loaded: LoadedModel) -> str:
    """What files are called: as the backend saves them, of which some read what transformers takes for another."""
    backend = loaded.backend
    is_common = "transformers" in backend.capabilities.readable_by or not backend.can("save")
    return "model" if is_common else checkpoints.OWN_FORMAT


def _tensors(model: Any, layers: Iterable[tuple[str, Mapping[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    packed = {name for name, module in model.named_modules() if isinstance(module, RepackedLinear)}
    tied = checkpoints.tied_tensors(model)
    for name, tensor in model.state_dict().items():
        owner, _, short = name.rpartition(".")
        if name not in tied and (owner not in packed or short == "bias"):
            yield name, tensor.detach()
    for name, tensors in layers:
        for short, tensor in tensors.items():
            yield f"{name}.{short}", tensor


def _write_shards(tensors: Iterable[tuple[str, Tensor]], out: Path, stem: str, metadata: dict[str, str]) -> None:
    """`stem`.safetensors, or several with an index beside them, as transformers reads them."""
    files: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        path = out / f"{stem}-{len(files):05}.partial"
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, path, metadata)
        files.append((path, list(shard)))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(files) == 1:
        files[0][0].rename(out / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(files, 1):
        file = f"{stem}-{number:05}-of-{len(files):05}.safetensors"
        path.rename(out / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX.format(stem)).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
