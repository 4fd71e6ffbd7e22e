"""How modules of integers store their weights, and how they are made: of dense ones, or of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.plugin import LayerInfo, resolved_dtype
from polyquant.plugin.layers import (
    PackedWeight,
    Part,
    Quantized,
    describe,
    layer_tensors,
    pack_weight,
    prepare_for_training,
    require_parts,
    rows_of,
)
from torch import Tensor

from polyquant_row_scales._decode import integers, quantize_eetq, quantize_gemma, rows_of_eetq
from polyquant_row_scales._modules import KERNEL, GemmaEmbedding, GemmaLinear, RowLinear
from polyquant_row_scales.options import EetqOptions, GemmaOptions
from polyquant_row_scales.planning import ACTIVATIONS, EMBEDDING, layout, row_bytes

__all__ = ["prepare_for_training"]  # freezing is all that adapters need


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["modules_to_not_convert"] or ())


def quantize_linear(linear: Any, config: EetqOptions | GemmaOptions) -> RowLinear:
    """A layer that takes the place of `linear`. Raises ModelError where that holds NaN or infinity."""
    weight, dtype = rows_of(linear), getattr(torch, resolved_dtype(config))
    if isinstance(config, EetqOptions):
        codes, scales = quantize_eetq(weight)
        if not bool(torch.isfinite(scales).all()):
            raise ModelError("its weights are too large for scales in float16; skip this module")
        return RowLinear(
            linear, _with_bias(linear, {"weight": codes, "weight_scales": scales}), "weight_scales", 8, dtype
        )
    codes, scales = quantize_gemma(weight, config.num_bits)
    off = {name: torch.zeros((), device=weight.device) for name in ACTIVATIONS}
    tensors = _with_bias(linear, {"weight": codes, "weight_scale": scales, **off})
    return GemmaLinear(linear, tensors, "weight_scale", config.num_bits, dtype)


def quantize_embedding(embedding: Any, config: GemmaOptions) -> GemmaEmbedding:
    """An embedding that takes the place of a dense one. Raises ModelError where that holds NaN or infinity."""
    made = quantize_gemma(rows_of(embedding), config.num_bits)
    dtype = getattr(torch, resolved_dtype(config))
    return GemmaEmbedding(embedding, dict(zip(EMBEDDING, made, strict=True)), config.num_bits, dtype)


def linear_from_tensors(
    linear: Any, config: EetqOptions | GemmaOptions, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> RowLinear:
    """A layer of stored tensors. Raises ModelError where they are wrong."""
    shape = (linear.out_features, linear.in_features)
    expected: dict[str, Any] = dict(layout(shape, config))
    eetq = isinstance(config, EetqOptions)
    if not eetq:
        expected |= {name: Part((), "float", least=0, optional=True) for name in ACTIVATIONS}
        expected["weight_scale"] = Part((shape[0], 1), "float")
    found = layer_tensors(linear, tensors, expected)
    if "bias" in found:
        found["bias"] = found["bias"].to(dtype)
    if isinstance(config, EetqOptions):
        return RowLinear(linear, found | {"weight": rows_of_eetq(found["weight"])}, "weight_scales", 8, dtype)
    numbers = {name: found.get(name, torch.zeros(())).float() for name in ("weight_scale", *ACTIVATIONS)}
    return GemmaLinear(linear, found | numbers, "weight_scale", config.num_bits, dtype)


def embedding_from_tensors(
    embedding: Any, config: GemmaOptions, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> GemmaEmbedding:
    """An embedding of stored tensors. Raises ModelError where they are wrong."""
    rows, columns = embedding.num_embeddings, embedding.embedding_dim
    codes, scales = EMBEDDING
    whole = config.num_bits == 8
    blocks = tensors[scales].shape[1] if scales in tensors and tensors[scales].dim() == 2 else 1
    parts = {
        codes: Part((rows, columns if whole else row_bytes(columns, config)), "int8" if whole else "uint8"),
        scales: Part((rows, gcd(blocks, columns)), "float"),  # blocks of whole columns
    }
    require_parts((rows, columns), tensors, parts)
    return GemmaEmbedding(embedding, {codes: tensors[codes], scales: tensors[scales].float()}, config.num_bits, dtype)


def pack(module: RowLinear) -> PackedWeight:
    """EETQ's; a Gemma layer rounds its activations, which the packed layout has no place for."""
    return pack_weight(integers(module.weight.detach(), module.bits, module.in_features), module.scales)


def _with_bias(linear: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors if linear.bias is None else tensors | {"bias": linear.bias.detach()}


def _quantized(name: str, module: Any) -> Quantized | None:
    if isinstance(module, GemmaEmbedding):
        shape = (module.num_embeddings, module.embedding_dim)
        return Quantized(shape, module.bits, f"gemma{module.bits}", KERNEL, role="embedding", dense=())
    if isinstance(module, GemmaLinear):
        return Quantized((module.out_features, module.in_features), module.bits, f"gemma{module.bits}", module.kernel)
    if isinstance(module, RowLinear):
        return Quantized((module.out_features, module.in_features), 8, "eetq8", KERNEL)
    return None
