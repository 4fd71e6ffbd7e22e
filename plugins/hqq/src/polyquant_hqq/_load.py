"""Quantizes layer by layer, and reads and writes checkpoints: transformers 5 no longer does either for HQQ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import HQQLinear
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, quantized_modules, resolved_dtype

from polyquant_hqq._layers import KERNEL, linear_from_tensors, quantize_linear
from polyquant_hqq.options import HqqOptions
from polyquant_hqq.planning import plan_layers


def load(request: LoadRequest, config: HqqOptions) -> LoadedModel:
    wanted = resolved_dtype(config)
    dtype, device = getattr(torch, wanted), checkpoints.single_device(request)

    def read(name: str, linear: Any, tensors: dict[str, torch.Tensor]) -> Any:
        moved = {key: tensor.to(device) for key, tensor in tensors.items()}
        return linear_from_tensors(linear, config, dtype, moved)

    if request.source.stored_quantization:
        names = sorted(checkpoints.packed_modules(request.source, ("W_q",)))
        model = checkpoints.read_layers(request, wanted, names, read)
    else:
        names = quantized_modules(plan_layers(request.weights, config))
        model = checkpoints.quantize_layers(
            request, wanted, names, lambda name, linear: quantize_linear(linear, config), on_cpu=False
        )
    notes = [] if config.optimize else ["zero points are not optimized: this is plain rounding, not HQQ"]
    return LoadedModel(model=model, config=config, kernel=KERNEL, notes=notes)


def save(loaded: LoadedModel, out: Path) -> Path:
    """The tensors under the names transformers 4 gave them: W_q, scale and zero of each layer."""
    tensors = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    for name, module in loaded.model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, HQQLinear):
            tensors |= {f"{prefix}{key}": module.meta[key] for key in ("scale", "zero")}
        kept = set(module._buffers) - module._non_persistent_buffers_set
        tensors |= {f"{prefix}{key}": module._buffers[key] for key in kept if module._buffers[key] is not None}
    return checkpoints.save(loaded, out, tensors)
