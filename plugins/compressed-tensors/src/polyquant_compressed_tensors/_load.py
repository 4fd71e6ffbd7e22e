"""Reads checkpoints into packed layers, and writes them. Imports torch; the library comes with `_layers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from polyquant.errors import ModelError, UnsupportedOperation
from polyquant.memory.weights import list_weights
from polyquant.models import hf
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, layers, resolved_dtype

from polyquant_compressed_tensors._int4pack import Int4PackLinear
from polyquant_compressed_tensors._layers import PackedLinear, packed_linear
from polyquant_compressed_tensors.options import CompressedTensorsOptions
from polyquant_compressed_tensors.planning import quantized_modules, uses_int4pack
from polyquant_compressed_tensors.stored import OWN, own_fields, plain_format


def load(request: LoadRequest, config: CompressedTensorsOptions) -> LoadedModel:
    source, wanted = request.source, resolved_dtype(config)
    config = config.with_kernel(torch.device(request.device).type, wanted)
    plain = plain_format(source.stored_quantization)
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=request.trust_remote_code)

    def make(name: str, module: Any, tensors: dict[str, torch.Tensor]) -> Any:
        try:
            layer = packed_linear(module, config, getattr(torch, wanted), tensors, plain=plain)
        except ModelError as error:
            raise ModelError(f"{name} cannot be read: {error}") from error
        return Int4PackLinear(layer) if uses_int4pack((layer.out_features, layer.in_features), config) else layer

    weights = list_weights(hf.skeleton(source, wanted, trust_remote_code=request.trust_remote_code))
    model = checkpoints.read_layers(request, wanted, quantized_modules(weights, config), make)
    model.config.quantization_config = {**source.stored_quantization, OWN: own_fields(msgspec.structs.asdict(config))}
    kernels = dict.fromkeys(module.kernel for module in model.modules() if isinstance(module, PackedLinear))
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=" and ".join(kernels))


def save(loaded: LoadedModel, out: Path) -> Path:
    """The tensors in the format they were read in, and the quantization_config with the compute dtype."""
    stored = dict(loaded.model.config.quantization_config)
    plain, tensors = plain_format(stored), dict[str, torch.Tensor]()
    for name, module in loaded.model.named_modules():
        if isinstance(module, PackedLinear):
            own = module.checkpoint_tensors(plain=plain)
        else:
            own = {key: tensor.detach() for key, tensor in module._parameters.items() if tensor is not None}
            own |= {
                key: tensor for key, tensor in module._buffers.items()
                if tensor is not None and key not in module._non_persistent_buffers_set
            }  # fmt: skip
        tensors |= {f"{name}.{key}" if name else key: tensor for key, tensor in own.items()}
    return checkpoints.save(loaded, out, tensors, stored)


def prepare_for_training(loaded: LoadedModel) -> Any:
    """Freeze, and recompute activations in the backward pass.

    Raises UnsupportedOperation for rounded activations: no gradient passes through them to the adapters below.
    """
    if getattr(loaded.config, "dynamic_activations", False):
        raise UnsupportedOperation(
            "no gradient passes through dynamic_activations; train on a checkpoint whose activations are not rounded"
        )
    return layers.frozen_for_adapters(loaded.model)
