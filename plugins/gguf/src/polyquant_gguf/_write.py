"""Writes GGUF files that load back bit for bit: a copy of the source, or a new one for a model quantized here."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from polyquant.errors import ModelError, SaveError
from polyquant.plugin import LoadedModel, ModelSource, checkpoints
from polyquant.plugin.gguf import FLOAT_DTYPES, TYPES, Entry, read_header
from polyquant.plugin.layers import ExpertStack
from torch import Tensor

from polyquant_gguf import _metadata
from polyquant_gguf._modules import Held, PackedLinear, experts_of, held_tensors
from polyquant_gguf._read import as_loaded, places_of, row_order
from polyquant_gguf.names import Placed, Rules, gguf_names, is_permuted, put
from polyquant_gguf.options import OPTIONS_KEY, GgufOptions

NEW_FILE = "model.gguf"
New = tuple[str, "np.ndarray[Any, Any]", GGMLQuantizationType]
FLOATS = {getattr(torch, dtype): name for name, dtype in FLOAT_DTYPES.items()}


def save(loaded: LoadedModel, out: Path) -> Path:
    """Raises SaveError where the model cannot be written exactly."""
    if loaded.request is None:
        raise SaveError("where this model came from is unknown: load it through polyquant")
    source, options = loaded.request.source, cast("GgufOptions", loaded.config)
    if not source.gguf_file:
        _write_new(loaded, out)
    elif options.split_mib:
        raise SaveError(
            f"split_mib is for files made of a dense model, and this would be a copy of {source.gguf_file}: leave it "
            "out, and split the copy with llama-gguf-split"
        )
    else:
        _copy(loaded, source, out)
        if "tokenizer.ggml.model" not in read_header(out / source.gguf_file).metadata:
            loaded.tokenizer.save_pretrained(out)
        if (source.path / _metadata.GENERATION_CONFIG).exists():
            loaded.model.generation_config.save_pretrained(out)
    return out


def _copy(loaded: LoadedModel, source: ModelSource, out: Path) -> None:
    """The source's file; a tensor that was changed since it was loaded is written over its place."""
    for name in source.weight_files:
        shutil.copyfile(source.path / name, out / name)
    held = _held(loaded.model)
    config: Any = loaded.config
    for name, placed in places_of(loaded.model, read_header(out / source.gguf_file)).items():
        tensor = held[name].parameter.cpu()
        if torch.equal(tensor, as_loaded(placed, config)):
            continue
        for entry, stored in zip(placed.entries, _as_stored(tensor, placed), strict=True):
            with entry.path.open("r+b") as file:
                file.seek(entry.start)
                file.write(stored.tobytes())
        if not torch.equal(tensor, as_loaded(placed, config)):
            raise SaveError(f"{name} was changed, and {placed.type.name} cannot hold it exactly")


def _as_stored(tensor: Tensor, placed: Placed) -> Iterator[np.ndarray[Any, Any]]:
    """A tensor's bytes in the file: rows in llama.cpp's order, offset added, in the entries' type."""
    if tensor.dtype != torch.uint8:
        numbers = tensor.float() + placed.offset if placed.offset else tensor
        dtype = FLOAT_DTYPES.get(placed.type.name)
        if dtype is None:
            raise SaveError(f"{placed.entry.name} was changed, and lies in {placed.type.name} blocks in the file")
        tensor = numbers.to(getattr(torch, dtype))
    return (part.view(torch.uint8).numpy() for part in in_file(tensor, placed))


def in_file(tensor: Tensor, placed: Placed) -> Iterator[Tensor]:
    """A tensor of the model as each of its entries has it: rows in llama.cpp's order, gates apart from ups."""
    if placed.heads:
        tensor = tensor[torch.argsort(row_order(placed.shape[0], placed.heads))]
    if placed.is_transposed and tensor.dtype != torch.uint8:
        tensor = tensor.transpose(1, 2)
    count = len(placed.entries)
    if count == 1:
        parts = [tensor]
    else:
        parts = [tensor[:, part::count] for part in range(count)] if placed.alternates else list(tensor.chunk(count, 1))
    is_packed = tensor.dtype == torch.uint8
    return ((part if is_packed else part.reshape(placed.shape_in_file)).contiguous() for part in parts)


def write_unpacked(loaded: LoadedModel, layers: Iterable[tuple[str, dict[str, Tensor]]], out: Path) -> Path:
    """A new file, whose layers are `layers`."""
    config: Any = loaded.config
    for name, tensors in layers:
        block, module = TYPES[dict(config.layers).get(name, config.type)], loaded.model.get_submodule(name)
        if isinstance(module, ExpertStack):
            checkpoints.put(loaded.model, name, experts_of(tensors["weight"], block, transposed=module.transposed))
        else:
            loaded.model.set_submodule(name, PackedLinear(tensors["weight"], block, module.bias))
    _write_new(loaded, out)
    return out


def _write_new(loaded: LoadedModel, out: Path) -> None:
    model = loaded.model
    architecture, rules = _metadata.architecture_of(model.config)
    options: Any = loaded.config
    written = {OPTIONS_KEY: msgspec.json.encode(options.to_written()).decode()}
    keys = _metadata.model_keys(model.config, architecture) | written | _metadata.token_ids(model.config)
    tokens = _metadata.tokenizer_keys(loaded.tokenizer, architecture, int(model.config.vocab_size))

    def write(keys: dict[str, Any]) -> ModelSource:
        files = _write(out, architecture, keys, _new_tensors(model, architecture, rules), options.split_mib)
        return ModelSource(name=str(out / files[0]), path=out, gguf_file=files[0], weight_files=tuple(files))

    source = write(keys | (tokens or {}))
    try:
        read_back = checkpoints.read_config(source)
    except ModelError as error:
        raise SaveError(f"no GGUF of this model can be read back: {error}") from error
    _metadata.require_same_config(model.config, read_back)
    if tokens is None or not _metadata.same_tokenizer(loaded.tokenizer, checkpoints.load_tokenizer(source)):
        if tokens is not None:
            for name in source.weight_files:
                (out / name).unlink()
            source = write(keys)
        loaded.tokenizer.save_pretrained(out)
        loaded.notes.append(
            "a GGUF cannot express this tokenizer exactly: its files were written beside model.gguf, and llama.cpp "
            "needs them converted"
        )
    _check_written(loaded, out / source.gguf_file)
    if model.can_generate():
        model.generation_config.save_pretrained(out)


def _write(out: Path, architecture: str, keys: dict[str, Any], tensors: Iterable[New], split_mib: int) -> list[str]:
    """Names of the files, the first one first. split_mib: see the options."""
    writer = GGUFWriter(out / NEW_FILE, architecture, split_max_size=split_mib * 2**20)
    for key, value in keys.items():
        _metadata.add(writer, key, value)
    for name, array, kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.name for path in out.glob(f"{Path(NEW_FILE).stem}*.gguf"))


def _new_tensors(model: Any, architecture: str, rules: Rules) -> Iterator[New]:
    """(GGUF name, bytes, type): vectors and routers in F32 as llama.cpp has them, dense matrices in their own dtype."""
    held, config = _held(model), model.config.get_text_config()
    names = gguf_names(architecture, config.num_hidden_layers, held)
    if homeless := [name for name in held if name not in names]:
        raise SaveError(f"GGUF's {architecture} has no place for {', '.join(homeless[:3])}")
    for name, (parameter, shape, packed) in held.items():
        tensor, block = parameter.cpu(), packed or TYPES[FLOATS[parameter.dtype]]
        placed = put(rules, name, shape, tuple(Entry(each, (), block, 0, 0, Path()) for each in names[name]))
        if rules.permutes and is_permuted(placed.entry.name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            placed = placed._replace(heads=heads)
        if not placed.holds_blocks:
            tensor, block = tensor.float() + placed.offset, TYPES["F32"]
        for entry, part in zip(placed.entries, in_file(tensor, placed), strict=True):
            yield entry.name, part.view(torch.uint8).numpy(), GGMLQuantizationType[block.name]


def _held(model: Any) -> dict[str, Held]:
    return held_tensors(model, checkpoints.tied_tensors(model))


def _check_written(loaded: LoadedModel, path: Path) -> None:
    """Raises SaveError where a tensor would load back otherwise, such as a norm that lost bits to its offset."""
    own = _held(loaded.model)
    config = msgspec.structs.replace(loaded.config, compute_dtype="float32")  # of what is written it may be open
    for name, placed in places_of(loaded.model, read_header(path)).items():
        held = own[name].parameter.cpu()
        if not torch.equal(held, as_loaded(placed, config).to(held.dtype)):
            raise SaveError(f"{name} does not survive GGUF's conventions bit for bit; nothing was written")
