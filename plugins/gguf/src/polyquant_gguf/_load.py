"""Loads a GGUF as it is, or a dense checkpoint quantized on the way."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from polyquant.errors import ModelError
from polyquant.memory.weights import list_weights
from polyquant.models import hf
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, resolved_dtype
from polyquant.plugin.gguf import read_header

from polyquant_gguf import modules, quantizing
from polyquant_gguf.from_file import build, tokenizer_of
from polyquant_gguf.names import rules_of
from polyquant_gguf.options import GgufOptions
from polyquant_gguf.planning import quantized_types

KERNEL = "torch dequantize"


def load(request: LoadRequest, config: GgufOptions) -> LoadedModel:
    source = request.source
    if not source.gguf_file and source.stored_quantization:
        raise ModelError(
            f"{source.name}: a packed model saved by transformers cannot be read; name the .gguf file instead"
        )
    model, tokenizer, config = _from_file(request, config) if source.gguf_file else _on_the_fly(request, config)
    model.config.quantization_config = config.native()
    _dispatch(model, request)
    return LoadedModel(model=model.eval(), tokenizer=tokenizer, config=config, kernel=KERNEL)


def _from_file(request: LoadRequest, config: GgufOptions) -> tuple[Any, Any, GgufOptions]:
    path = request.source.path / request.source.gguf_file
    header = read_header(path)  # before transformers reads the file: it trusts what it reads
    rules_of(header)
    if config.type == "file":
        config = msgspec.structs.replace(config, file=str(path))
    tokenizer = tokenizer_of(request, header)  # first: its reading takes more memory for a moment than the weights
    return build(request, header, config), tokenizer, config


def _on_the_fly(request: LoadRequest, config: GgufOptions) -> tuple[Any, Any, GgufOptions]:
    """Quantized from the dtype the checkpoint is stored in, layer by layer on the CPU; the rest is then cast."""
    source, dtype = request.source, getattr(torch, resolved_dtype(config))
    skeleton = hf.skeleton(source, resolved_dtype(config), trust_remote_code=request.trust_remote_code)
    types = quantized_types(list_weights(skeleton), config)  # raises before any weight is read
    stored = source.config.get("dtype") or source.config.get("torch_dtype")
    on_cpu = msgspec.structs.replace(request, device_map={"": "cpu"})
    model = checkpoints.load_causal_lm(
        on_cpu, stored if stored in ("float32", "bfloat16", "float16") else resolved_dtype(config)
    )
    tied = checkpoints.tied_tensors(model)
    for name, block in types.items():
        packed = quantizing.quantize(name, model.get_parameter(name), block)
        modules.replace(model, name, packed, block, dtype)
        modules.share_tied(model, {other: origin for other, origin in tied.items() if origin == name}, dtype)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model, checkpoints.load_tokenizer(source, trust_remote_code=request.trust_remote_code), config


def _dispatch(model: Any, request: LoadRequest) -> None:
    places = set(request.device_map.values())
    if len(places) == 1:
        model.to(next(iter(places)))
        return
    from accelerate import dispatch_model

    dispatch_model(model, device_map=dict(request.device_map))
