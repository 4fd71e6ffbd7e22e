"""Quantizes layer by layer, and reads and writes checkpoints: transformers dequantizes them where no GPU is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import msgspec
import torch
from polyquant.errors import ConfigError, ModelError
from polyquant.memory.weights import list_weights
from polyquant.models import hf
from polyquant.plugin import Dtype, LoadedModel, LoadRequest, WeightInfo, checkpoints, layers, resolved_dtype
from tqdm import tqdm

from polyquant_fp8._layers import linear_from_tensors, quantized_linear
from polyquant_fp8.modules import KERNEL
from polyquant_fp8.options import Fp8Options
from polyquant_fp8.planning import plan_layers

ACTIVATIONS = "activations stay in {}: the checkpoint asks for {} FP8 activations, which GPU kernels round to for speed"


def load(request: LoadRequest, config: Fp8Options) -> LoadedModel:
    wanted: Dtype = resolved_dtype(config)
    tokenizer = checkpoints.load_tokenizer(request.source, trust_remote_code=request.trust_remote_code)
    weights = list_weights(hf.skeleton(request.source, wanted, trust_remote_code=request.trust_remote_code))
    if request.source.stored_quantization:
        stored = checkpoints.packed_modules(request.source, ("weight_scale_inv",))
        config, notes = checkpoints.with_stored_skips(config, weights, stored, request.source)
        model = _read(request, config, _names(weights, config))
        notes.append(ACTIVATIONS.format(wanted, config.activation_scheme))
    else:
        model, notes = _quantize(request, config, _names(weights, config)), []
    model.config.quantization_config = config.stored()
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=KERNEL, notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    """Under the names transformers gives them: weight and weight_scale_inv of each layer."""
    tensors = {name: tensor.detach() for name, tensor in loaded.model.state_dict().items()}
    return checkpoints.save(loaded, out, tensors, dict(loaded.model.config.quantization_config))


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and recompute activations in the backward pass."""
    return layers.frozen_for_adapters(loaded.model)


def _names(weights: list[WeightInfo], config: Fp8Options) -> list[str]:
    return [plan.name.rpartition(".")[0] for plan in plan_layers(weights, config) if plan.quantized]


def _quantize(request: LoadRequest, config: Fp8Options, names: list[str]) -> Any:
    """The dense model, loaded in the checkpoint's dtype on the CPU, its layers replaced one by one."""
    if config.activation_scheme == "static":
        raise ConfigError("activation_scheme 'static' needs scales that a checkpoint brings; quantize with 'dynamic'")
    wanted: Dtype = resolved_dtype(config)
    dtype, stored = (
        getattr(torch, wanted),
        request.source.config.get("dtype") or request.source.config.get("torch_dtype"),
    )
    on_cpu = msgspec.structs.replace(request, device_map={"": "cpu"})
    model = checkpoints.load_causal_lm(on_cpu, stored if stored in get_args(Dtype) else wanted)
    for name in tqdm(names, desc="Quantizing", unit="layer", disable=not request.progress):
        model.set_submodule(name, quantized_linear(name, model.get_submodule(name), config, dtype))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1 and not name.endswith("weight_scale_inv"):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    checkpoints.place(model, request)
    return model


def _read(request: LoadRequest, config: Fp8Options, names: list[str]) -> Any:
    dtype = resolved_dtype(config)

    def make(name: str, module: Any, tensors: dict[str, torch.Tensor]) -> Any:
        return linear_from_tensors(name, module, config, getattr(torch, dtype), tensors)

    def check(name: str, tensor: torch.Tensor) -> None:
        if tensor.element_size() == 1 and tensor.is_floating_point():
            raise ModelError(f"{request.source.name}: {name} is {tensor.dtype}, and has no weight_scale_inv beside it")

    return checkpoints.read_layers(request, dtype, names, make, check=check)
