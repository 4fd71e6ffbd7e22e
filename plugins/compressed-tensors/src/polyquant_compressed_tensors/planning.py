"""Tensors of a layer in checkpoints and in memory, from shapes alone. Format: compressed_tensors.compressors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Literal, NamedTuple

import msgspec
from polyquant.errors import ConfigError
from polyquant.plugin import (
    DTYPE_BYTES,
    LayerPlan,
    PackedFormat,
    WeightInfo,
    is_linear,
    module_of,
    one_expert,
    plan_linears,
    unfit,
)
from polyquant.plugin.layouts import packed_group

from polyquant_compressed_tensors.arguments import BLOCK
from polyquant_compressed_tensors.formats import SHARING, is_ignored, joined_matrices
from polyquant_compressed_tensors.options import OWN_CHOICE, CompressedTensorsOptions

SCALE = "float"  # dtype of a scale in floating point: the compute dtype in memory, any in a checkpoint
WORD_BITS, BYTE_BITS = 32, 8
KINDS: Mapping[str, Literal["affine4", "codebook4", "int8", "float8"]] = {
    "int4": "affine4", "int8": "int8", "fp8": "float8", "mxfp8": "float8", "mxfp4": "codebook4", "nvfp4": "codebook4"
}  # fmt: skip
"""Weights -> what their codes are with kernel="packed"."""
PACKED_SCALES = {"mxfp4": "bfloat16", "mxfp8": "bfloat16", "nvfp4": "float8_e4m3fn"}


class Tensor(NamedTuple):
    """One tensor of a quantized layer."""

    shape: tuple[int, ...]
    dtype: str  # torch's name, or SCALE


def plan_layers(weights: Sequence[WeightInfo], config: CompressedTensorsOptions) -> list[LayerPlan]:
    """Where the kernel is left open, for the CPU. Raises ConfigError where groups do not fit.

    And where experts are fused: in a dense checkpoint, or packed otherwise than one by one.
    """
    config = config.with_kernel("cpu", config.compute_dtype) if config.kernel in OWN_CHOICE else config
    names = dict.fromkeys(module_of(weight) for weight in weights)
    config = msgspec.structs.replace(config, skip=tuple(name for name in names if is_ignored(name, config.skip)))
    dense = not any(weight.parts for weight in weights)  # a model, from which a checkpoint is to be made
    fused = (weight for weight in weights if weight.role == "experts" and not is_stack(weight))
    if found := next((weight.name for weight in fused if dense or weight.parts), None):
        raise ConfigError(
            f"{found} holds fused experts, which compressed-tensors has no layout for here; "
            "choose a model without experts, or a backend that leaves them dense (polyquant backends)"
        )
    plans = [_plan(weight, config) for weight in weights]
    if dense:
        _require_alike({module_of(plan): plan.scheme for plan in plans if plan.role == "linear"})
    return plans


def _require_alike(schemes: Mapping[str, str]) -> None:
    """Raises ConfigError where layers that are to share the scale of nvfp4 have formats that differ.

    schemes: of the linear layers by their names, dense ones too.
    """
    for name, scheme in schemes.items():
        owner, _, own = name.rpartition(".")
        together = next((names for names in SHARING if own in names), ())
        beside = [each for each in (f"{owner}.{other}" for other in together) if each in schemes]
        other = next((each for each in beside if schemes[each] != scheme), None)
        if scheme.startswith("nvfp4") and other is not None and len(beside) == len(together):
            raise ConfigError(
                f"{name} is to be {scheme} and {other} {schemes[other]}: {', '.join(together)} share one scale there, "
                f"so give all of them {scheme} or none (layers, skip)"
            )


def is_stack(weight: WeightInfo) -> bool:
    """Whether it is experts that the checkpoint holds one by one, packed, and each can be multiplied alone."""
    return weight.stacked == "out_in" and "weight_scale" in _own_parts(weight)


def is_sparse(weight: WeightInfo, config: CompressedTensorsOptions) -> bool:
    """Whether the checkpoint holds half of a layer's weights, with a mask; or the options say so."""
    return "compressed" in weight.parts or config.weights == "sparse"


def _own_parts(weight: WeightInfo) -> dict[str, str]:
    """What the file holds of each expert of a stack -> dtype; `parts` has that of all experts of their layer."""
    own = f"{weight.name.rpartition('.')[2]}."
    return {name.removeprefix(own): dtype for name, dtype in weight.parts.items() if name.startswith(own)}


def _plan(weight: WeightInfo, config: CompressedTensorsOptions) -> LayerPlan:
    """Of one tensor, in its own format."""
    own, stack = config.of(weight), is_stack(weight)
    one = msgspec.structs.replace(one_expert(weight), parts=_own_parts(weight)) if stack else weight
    count, matrices = (weight.shape[0], joined_matrices(weight.name)) if stack else (1, 1)
    named = config.format_of(weight)
    (plan,) = plan_linears(
        [weight], own, own.scheme, lambda _: count * quantized_bytes(one, own, named=named, matrices=matrices),
        takes=lambda weight, _: stack or is_linear(weight, config),
        packed=lambda _: None if is_sparse(weight, own) else packed_format(one, own),
    )  # fmt: skip
    return plan


def packed_format(weight: WeightInfo, config: CompressedTensorsOptions) -> PackedFormat:
    """The layout of a weight with kernel="packed"."""
    stored = weight.parts.get("weight_scale", weight.dtype)
    return PackedFormat(
        kind=KINDS[config.weights], group_size=packed_group(weight.shape[1], columns_of_a_scale(config)),
        scale_dtype=packed_scale(config.weights, stored, weight.dtype),  # type: ignore[arg-type]  # as torch calls it
        offsets="none" if config.symmetric else "zeros", row_scales="divide" if config.weights == "nvfp4" else "none",
    )  # fmt: skip


def columns_of_a_scale(config: CompressedTensorsOptions) -> int:
    """How many columns share a scale; -1: all of a row."""
    return BLOCK[1] if config.strategy == "block" else config.group_size or -1


def packed_scale(weights: str, stored: str, compute_dtype: str) -> str:
    """The dtype of scales with kernel="packed": the stored one, where the compute dtype holds all of its values.

    mxfp4 and mxfp8 have powers of two, nvfp4 floats of 8 bits, divided by one of each row.
    """
    return PACKED_SCALES.get(weights) or (stored if compute_dtype == "float32" else compute_dtype)


def quantized_bytes(
    weight: WeightInfo, config: CompressedTensorsOptions, *, named: str | None = None, matrices: int = 1
) -> int:  # fmt: skip
    """Bytes in memory, with scales and zero points. named: its own format, if any; matrices: as `checkpoint_tensors`.

    Raises ConfigError where the groups do not fit.
    """
    _require_fit(weight, config, named)
    sizes = {**DTYPE_BYTES, "float8_e4m3fn": 1, SCALE: DTYPE_BYTES[weight.dtype]}
    return sum(
        prod(tensor.shape) * sizes[tensor.dtype]
        for tensor in held_tensors(weight.shape, config, matrices, sparse=is_sparse(weight, config)).values()
    )


def _require_fit(weight: WeightInfo, config: CompressedTensorsOptions, named: str | None) -> None:
    columns = weight.shape[1]
    size = BLOCK[1] if config.strategy == "block" else config.group_size
    if size is None or columns % size == 0:
        return
    fitting = [other for other in (32, 64, 128, 256) if columns % other == 0]
    free = config.strategy == "group" and config.weights in ("int4", "int8")
    fixes = [f"group_size={max(fitting)}"] if fitting and free else []
    fixes += ["strategy='channel'"] if config.weights in ("int4", "int8", "fp8") else []
    if named is not None:
        fixes = [f"another format for it in layers than {named!r}"]
    raise unfit(weight, f"groups of {size} do not divide in_features {columns}", fixes)


def held_tensors(
    shape: tuple[int, ...], config: CompressedTensorsOptions, matrices: int = 1, *, sparse: bool = False
) -> dict[str, Tensor]:  # fmt: skip
    """What a layer holds in memory: 8-bit weights a byte each, 4-bit ones as the checkpoint or torch's matmul has them.

    shape: (out_features, in_features).
    """
    if sparse:
        tensors = checkpoint_tensors(shape, config, plain=True, sparse=True)
        del tensors["shape"]
        half = tensors.pop("compressed")
        return {**tensors, "weight_packed": half}
    if uses_int4pack(shape, config):
        packed, scales = Tensor((shape[0], shape[1] // 2), "uint8"), scale_shape(shape, config)
        return {"weight_packed": packed, "weight_scale": Tensor((scales[1], scales[0], 2), SCALE)}
    tensors = checkpoint_tensors(shape, config, plain=config.weight_bits == 8, matrices=matrices)
    codes = tensors.pop("weight", None) or tensors["weight_packed"]
    return {**{name: tensor for name, tensor in tensors.items() if name != "weight_shape"}, "weight_packed": codes}


def uses_int4pack(shape: tuple[int, ...], config: CompressedTensorsOptions) -> bool:
    """Whether torch's int4 matmul takes a layer: it wants its rows in sixteens."""
    return config.kernel == "pack_mm" and config.weights == "int4" and shape[0] % 16 == 0


def uses_int8pack(shape: tuple[int, ...], config: CompressedTensorsOptions) -> bool:
    """Whether torch's int8 matmul takes a layer: torch 2.13 reads past the end of a row without whole sixteens."""
    return config.kernel == "pack_mm" and config.weights == "int8" and shape[1] % 64 == 0


def checkpoint_tensors(
    shape: tuple[int, ...], config: CompressedTensorsOptions, *, plain: bool, matrices: int = 1, sparse: bool = False
) -> dict[str, Tensor]:  # fmt: skip
    """What a checkpoint stores of a layer. plain: 8-bit weights a byte each, not in words; sparse: half of them.

    matrices: as many matrices of an expert, of the same size, one's rows after the other's; a number for a whole
    matrix is there as often.
    """
    rows, columns = shape
    if sparse:
        return _sparse_tensors(shape, config)
    bits, scales = int(config.weight_bits), scale_shape(shape, config, matrices)
    activations = {"input_scale": Tensor((matrices,), SCALE)} if config.static_activations else {}
    if config.weights == "mxfp4":
        return {"weight_packed": Tensor((rows, columns // 2), "uint8"), "weight_scale": Tensor(scales, "uint8")}
    if config.weights == "nvfp4":
        packed, scale = Tensor((rows, columns // 2), "uint8"), Tensor(scales, "float8_e4m3fn")
        whole = ["weight_global_scale", *(["input_global_scale"] if config.dynamic_activations else [])]
        return {"weight_packed": packed, "weight_scale": scale, **dict.fromkeys(whole, Tensor((matrices,), "float32"))}
    if config.weights == "mxfp8":
        return {"weight": Tensor((rows, columns), "float8_e4m3fn"), "weight_scale": Tensor(scales, "uint8")}
    if plain:
        codes = {"weight": Tensor((rows, columns), "int8" if config.weights == "int8" else "float8_e4m3fn")}
        zeros = Tensor(scales, "int8")
    else:
        words = Tensor((rows, ceil(columns * bits / WORD_BITS)), "int32")
        codes = {"weight_packed": words, "weight_shape": Tensor((2 * matrices,), "int64")}
        zeros = Tensor((ceil(rows * bits / WORD_BITS), scales[1]), "int32")
    symmetric = {} if config.symmetric else {"weight_zero_point": zeros}
    return {**codes, "weight_scale": Tensor(scales, SCALE), **symmetric, **activations}


def _sparse_tensors(shape: tuple[int, ...], config: CompressedTensorsOptions) -> dict[str, Tensor]:
    """Half of each row, a bit for each weight, and what else there is of a layer that is not sparse."""
    rows, columns = shape
    quantized = config.weights != "sparse"
    dense = checkpoint_tensors(shape, config, plain=True) if quantized else {"weight": Tensor(shape, SCALE)}
    half = Tensor((rows, columns // 2), dense.pop("weight").dtype)
    mask = Tensor((rows, ceil(columns / BYTE_BITS)), "uint8")
    return {**dense, "compressed": half, "bitmask": mask, "shape": Tensor((2,), "int64")}


def scale_shape(shape: tuple[int, ...], config: CompressedTensorsOptions, matrices: int = 1) -> tuple[int, ...]:
    """Shape of weight_scale. matrices: as `checkpoint_tensors`."""
    rows, columns = shape
    if config.strategy == "tensor":
        return (matrices,)
    if config.strategy == "block":
        return ceil(rows / BLOCK[0]), ceil(columns / BLOCK[1])
    return rows, columns // config.group_size if config.group_size else 1
