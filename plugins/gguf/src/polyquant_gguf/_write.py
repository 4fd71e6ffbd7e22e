"""Writes GGUF files that load back bit for bit: a copy of the source, or a new one for a model quantized here."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from polyquant.errors import ModelError, SaveError
from polyquant.plugin import LoadedModel, ModelSource, checkpoints
from polyquant.plugin.gguf import FLOAT_DTYPES, TYPES, read_header
from torch import Tensor

from polyquant_gguf import _metadata
from polyquant_gguf._modules import Packed, PackedLinear
from polyquant_gguf._read import as_loaded, places_of, row_order
from polyquant_gguf.names import Placed, Rules, gguf_names
from polyquant_gguf.options import OPTIONS_KEY

NEW_FILE = "model.gguf"


def save(loaded: LoadedModel, out: Path) -> Path:
    """Raises SaveError where the model cannot be written exactly."""
    if loaded.request is None:
        raise SaveError("where this model came from is unknown: load it through polyquant")
    source = loaded.request.source
    if not source.gguf_file:
        _write_new(loaded, out)
    else:
        _copy(loaded, source, out / source.gguf_file)
        if "tokenizer.ggml.model" not in read_header(out / source.gguf_file).metadata:
            loaded.tokenizer.save_pretrained(out)
        if (source.path / _metadata.GENERATION_CONFIG).exists():
            loaded.model.generation_config.save_pretrained(out)
    return out


def _copy(loaded: LoadedModel, source: ModelSource, path: Path) -> None:
    """The source file; a tensor that was changed since it was loaded is written over its place."""
    shutil.copyfile(source.path / source.gguf_file, path)
    header, own = read_header(path), dict(loaded.model.named_parameters())
    config: Any = loaded.config
    with path.open("r+b") as file:
        for name, placed in places_of(loaded.model, header).items():
            tensor = own[name].detach().cpu()
            if torch.equal(tensor, as_loaded(file, placed, config)):
                continue
            file.seek(placed.entry.start)
            file.write(_as_stored(tensor, placed).tobytes())
            if not torch.equal(tensor, as_loaded(file, placed, config)):
                raise SaveError(f"{name} was changed, and {placed.entry.type.name} cannot hold it exactly")


def _as_stored(tensor: Tensor, placed: Placed) -> np.ndarray[Any, Any]:
    """A tensor's bytes in the file: rows in llama.cpp's order, offset added, in the entry's type."""
    if placed.heads:
        tensor = tensor[torch.argsort(row_order(placed.entry, placed.heads))]
    if tensor.dtype != torch.uint8:
        numbers = tensor.float() + placed.offset if placed.offset else tensor
        dtype = FLOAT_DTYPES.get(placed.entry.type.name)
        if dtype is None:
            raise SaveError(f"{placed.entry.name} was changed, and lies in {placed.entry.type.name} blocks in the file")
        tensor = numbers.to(getattr(torch, dtype)).contiguous().view(torch.uint8)
    return tensor.contiguous().numpy()


def write_unpacked(loaded: LoadedModel, layers: Iterable[tuple[str, dict[str, Tensor]]], out: Path) -> Path:
    """A new file, whose layers are `layers`."""
    config: Any = loaded.config
    for name, tensors in layers:
        block = TYPES[dict(config.layers).get(name, config.type)]
        bias = loaded.model.get_submodule(name).bias
        loaded.model.set_submodule(name, PackedLinear(tensors["weight"], block, bias))
    _write_new(loaded, out)
    return out


def _write_new(loaded: LoadedModel, out: Path) -> None:
    model, path = loaded.model, out / NEW_FILE
    architecture, rules = _metadata.architecture_of(model.config)
    options: Any = loaded.config
    written = {OPTIONS_KEY: msgspec.json.encode(options.to_written()).decode()}
    keys = _metadata.model_keys(model.config, architecture) | written
    tokens = _metadata.tokenizer_keys(loaded.tokenizer, architecture, int(model.config.vocab_size))
    _write(path, architecture, keys | _metadata.token_ids(model.config) | (tokens or {}), model, rules)
    source = ModelSource(name=str(path), path=out, gguf_file=path.name, weight_files=(path.name,))
    try:
        read_back = checkpoints.read_config(source)
    except ModelError as error:
        raise SaveError(f"no GGUF of this model can be read back: {error}") from error
    _metadata.require_same_config(model.config, read_back)
    if tokens is None or not _metadata.same_tokenizer(loaded.tokenizer, checkpoints.load_tokenizer(source)):
        if tokens is not None:
            _write(path, architecture, keys | _metadata.token_ids(model.config), model, rules)
        loaded.tokenizer.save_pretrained(out)
        loaded.notes.append(
            "a GGUF cannot express this tokenizer exactly: its files were written beside model.gguf, and llama.cpp "
            "needs them converted"
        )
    _check_written(loaded, path)
    if model.can_generate():
        model.generation_config.save_pretrained(out)


def _write(path: Path, architecture: str, keys: dict[str, Any], model: Any, rules: Rules) -> None:
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        _metadata.add(writer, key, value)
    for name, array, kind in _new_tensors(model, architecture, rules):
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _new_tensors(
    model: Any, architecture: str, rules: Rules
) -> Iterator[tuple[str, np.ndarray[Any, Any], GGMLQuantizationType]]:
    """(GGUF name, bytes, type): vectors in F32 as llama.cpp has them, dense matrices in their own dtype."""
    tied, config = checkpoints.tied_tensors(model), model.config.get_text_config()
    parameters = {name: tensor for name, tensor in model.named_parameters() if name not in tied}
    names = gguf_names(architecture, config.num_hidden_layers, parameters)
    if homeless := [name for name in parameters if name not in names]:
        raise SaveError(f"GGUF's {architecture} has no place for {', '.join(homeless[:3])}")
    floats = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for name, parameter in parameters.items():
        owner, tensor = model.get_submodule(name.rpartition(".")[0]), parameter.detach().cpu()
        if isinstance(owner, Packed) and parameter is owner.weight:
            kind = owner.block.name
        elif tensor.dim() == 1:
            kind, tensor = "F32", tensor.float() + (rules.norm_offset if name.endswith("norm.weight") else 0.0)
        else:
            kind = floats[tensor.dtype]
        if rules.permutes and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        yield names[name], tensor.contiguous().view(torch.uint8).numpy(), GGMLQuantizationType[kind]


def _check_written(loaded: LoadedModel, path: Path) -> None:
    """Raises SaveError where a tensor would load back otherwise, such as a norm that lost bits to its offset."""
    own = dict(loaded.model.named_parameters())
    config = msgspec.structs.replace(loaded.config, compute_dtype="float32")  # of what is written it may be open
    with path.open("rb") as file:
        for name, placed in places_of(loaded.model, read_header(path)).items():
            held = own[name].detach().cpu()
            if not torch.equal(held, as_loaded(file, placed, config).to(held.dtype)):
                raise SaveError(f"{name} does not survive GGUF's conventions bit for bit; nothing was written")
