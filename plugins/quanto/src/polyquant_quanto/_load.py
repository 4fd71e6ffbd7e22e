"""Loads models through transformers' quanto path, and quanto's own checkpoints. Imports torch and the library."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from optimum import quanto
from optimum.quanto.library.extensions import get_extension
from polyquant.errors import ModelError
from polyquant.plugin import LoadedModel, LoadRequest, Problem, checkpoints, layers, resolved_dtype

from polyquant_quanto._layers import kernel, make_safe
from polyquant_quanto.options import QuantoOptions

QTYPES = {"int8": quanto.qint8, "int4": quanto.qint4, "int2": quanto.qint2, "float8": quanto.qfloat8}


def native_problems(device: str) -> list[Problem]:
    """On CUDA quanto compiles its kernels on first use, which needs nvcc."""
    from torch.utils.cpp_extension import CUDA_HOME

    if not device.startswith("cuda") or CUDA_HOME:
        return []
    what = "optimum-quanto compiles its CUDA kernels on first use, and no CUDA compiler (nvcc) is installed"
    fix = f"install the CUDA toolkit {torch.version.cuda} and set CUDA_HOME, or use --device cpu"
    return [Problem(what=what, fix=fix, kind="native")]


def load(request: LoadRequest, config: QuantoOptions) -> LoadedModel:
    notes = _prepare_unpacking() if config.weight_bits < 8 else []
    if request.source.stored_quantization:
        model = _read(request, config)
    else:
        model = checkpoints.load_causal_lm(request, resolved_dtype(config), config.native())
    make_safe(model)
    if config.weights == "int2":
        notes.append(
            "int2 rounds to four levels a group and fits nothing: a small model becomes noise (SmolLM2-135M does)"
        )
    kernels = {kernel(module.weight): None for module in model.modules() if _is_frozen(module)}
    tokenizer = checkpoints.load_tokenizer(request.source, trust_remote_code=request.trust_remote_code)
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=" + ".join(kernels), notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    """quanto's own format: its state dict in safetensors, its quantization map beside it."""
    checkpoints.save(loaded, out, dict(loaded.model.state_dict()), loaded.config.native().to_dict())
    quantization_map = quanto.quantization_map(loaded.model)
    (out / "quanto_qmap.json").write_text(json.dumps(quantization_map, indent=4))
    return out


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and recompute activations in the backward pass.

    PEFT's prepare_model_for_kbit_training casts every 16-bit parameter to float32, which quanto's tensors refuse.
    """
    return layers.frozen_for_adapters(loaded.model)


def _read(request: LoadRequest, config: QuantoOptions) -> Any:
    """A saved model; scales and dense weights in the compute dtype, which is the stored one unless asked."""
    dtype, device = getattr(torch, resolved_dtype(config)), checkpoints.single_device(request)
    casts = request.source.stored_quantization.get("compute_dtype") != config.compute_dtype
    model = checkpoints.empty_causal_lm(request, resolved_dtype(config))
    dense: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in checkpoints.read_tensors(request.source):
        scale_or_dense = tensor.is_floating_point() and tensor.itemsize > 1 and tensor.dim() > 0
        cast = tensor.to(dtype) if casts and scale_or_dense else tensor
        layer, found, rest = name.partition(".weight._")
        (layers[layer] if found else dense)[f"weight._{rest}" if found else name] = cast.to(device)
    for name, state in layers.items():
        linear = model.get_submodule(name)
        state |= {
            key: dense.pop(f"{name}.{key}")
            for key in ("bias", "input_scale", "output_scale")
            if f"{name}.{key}" in dense
        }
        module = quanto.QLinear.qcreate(linear, QTYPES[config.weights], device="meta")
        missing, left_over = module.load_state_dict(state, strict=False, assign=True)
        if missing or left_over or not _is_frozen(module):
            raise ModelError(f"{request.source.name}: {name} is incomplete: {', '.join(missing + left_over)}")
        module.weight.requires_grad_(requires_grad=False)
        model.set_submodule(name, module)
    checkpoints.fill(model, dense, request.source)
    model.config.quantization_config = config.native()
    return model.to(device)


def _is_frozen(module: Any) -> bool:
    return isinstance(module, quanto.QLinear) and module.frozen


def _prepare_unpacking() -> list[str]:
    """Compile quanto's C++ unpacking now, or fall back to its own version in torch, and say so."""
    extension = get_extension("quanto_cpp")
    try:
        _ = extension.lib
    except Exception as error:  # no compiler, no ninja, or a folder that cannot be written
        logging.getLogger(__name__).debug("quanto_cpp", exc_info=error)
        extension._lib = SimpleNamespace(unpack=_unpack)
        return [f"unpacks in torch: quanto's C++ unpacking could not be compiled ({str(error).splitlines()[0]})"]
    return []


def _unpack(packed_values: torch.Tensor, bits: int) -> torch.Tensor:
    """What quanto_cpp.unpack does: uint8 (rows, columns) to uint8 (8 / bits * rows, columns)."""
    return torch.cat([(packed_values >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])
