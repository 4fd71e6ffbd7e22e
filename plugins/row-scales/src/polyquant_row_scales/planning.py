"""The tensors of a layer from its shape alone. Formats: EetqLinear and QuantizedLinear of transformers.integrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod

from polyquant.errors import ConfigError
from polyquant.plugin import (
    DTYPE_BYTES,
    BackendOptions,
    LayerPlan,
    PackedFormat,
    WeightInfo,
    is_linear,
    module_of,
    plan_linears,
    refuse_experts,
    unfit,
)

from polyquant_row_scales.options import EetqOptions, GemmaOptions

TILE = 64
"""Rows and columns of which EETQ's order takes whole tiles."""
ACTIVATIONS = ("input_activation_scale", "output_activation_scale")
"""Of a Gemma layer: what its inputs and outputs are rounded by; 0: they are not."""
EMBEDDING = ("embedding_quantized", "embedding_scale")
PACKED = PackedFormat(kind="int8", group_size=-1, scale_dtype="float16")
"""EETQ's weights with kernel="packed"."""


def plan_layers(weights: Sequence[WeightInfo], config: EetqOptions | GemmaOptions) -> list[LayerPlan]:
    """Raises ConfigError for sizes that the format has no place for, fused experts, and a tied head of integers."""
    if isinstance(config, EetqOptions):
        refuse_experts(weights, config)
        return plan_linears(weights, config, config.scheme, _eetq_bytes, packed=lambda weight: PACKED)
    tied = {weight.tied_to for weight in weights}
    return [_gemma_plan(weight, config, weight.name in tied) for weight in weights]


def layout(shape: Sequence[int], config: EetqOptions | GemmaOptions) -> Mapping[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of a layer's tensors in a checkpoint. shape: (out_features, in_features)."""
    rows, columns = shape
    if isinstance(config, EetqOptions):
        return {"weight": ((columns, rows), "int8"), "weight_scales": ((rows,), "float16")}
    stored = ((rows, columns), "int8") if config.num_bits == 8 else ((rows, row_bytes(columns, config)), "uint8")
    return {"weight": stored, "weight_scale": ((rows, 1), "float32"), **dict.fromkeys(ACTIVATIONS, ((), "float32"))}


def row_bytes(columns: int, config: GemmaOptions) -> int:
    """Bytes of a row of so many codes, which may end within a byte."""
    return ceil(columns * config.num_bits / 8)


def is_embedding(weight: WeightInfo, config: GemmaOptions) -> bool:
    """Whether an embedding is to be integers."""
    return weight.role == "embedding" and config.quantize_embeddings and module_of(weight) not in config.skip


def _eetq_bytes(weight: WeightInfo) -> int:
    if any(size % TILE for size in weight.shape):
        raise unfit(weight, f"EETQ's order takes whole tiles of {TILE} rows and {TILE} columns, which there are not")
    return _bytes(layout(weight.shape, EetqOptions()))


def _gemma_plan(weight: WeightInfo, config: GemmaOptions, is_tied_to: bool) -> LayerPlan:
    own = config.of_module(module_of(weight))
    if weight.role == "experts" and not config.skips(weight):
        raise unfit(weight, "fused experts are not quantized")
    if not is_embedding(weight, config):
        (plan,) = plan_linears(
            [weight], own, own.scheme, lambda weight: _bytes(layout(weight.shape, own)), takes=_takes
        )
        return plan
    if is_tied_to:
        raise ConfigError.of_unfit(
            f"quantize_embeddings, and the head is tied to {weight.name}: its integers would be the head's too",
            ["quantize_embeddings=False"],
        )
    rows, columns = weight.shape
    return LayerPlan(
        name=weight.name, shape=weight.shape, role="embedding", bits=own.num_bits, scheme=own.scheme, quantized=True,
        stored_bytes=rows * row_bytes(columns, own) + 4 * rows,
    )  # fmt: skip


def _takes(weight: WeightInfo, config: BackendOptions) -> bool:
    return is_linear(weight, config)


def _bytes(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> int:
    return sum(prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in tensors.values())
