"""How layers are made, from dense ones or from a checkpoint's tensors, how they are packed, and what they store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from polyquant.errors import Misfit, ModelError
from polyquant.plugin import LayerInfo, Role
from polyquant.plugin.codes import packed_bits, unpacked_bits
from polyquant.plugin.floats import E2M1
from polyquant.plugin.layers import (
    ExpertStack,
    LinearExperts,
    PackedWeight,
    Part,
    Quantized,
    Rows,
    WeightCodes,
    describe,
    fits,
    in_bands,
    is_finite,
    pack_weight,
    prepare_for_training,
    require_parts,
    rows_of,
)
from polyquant.plugin.packing import exponents, fp4_codes, unsigned
from torch import Tensor, nn

from polyquant_mlx._decode import scale_numbers
from polyquant_mlx._modules import PARTS, MlxEmbedding, MlxLinear
from polyquant_mlx._quantize import encode
from polyquant_mlx.formats import FORMATS, Format
from polyquant_mlx.options import OWN, MlxOptions

__all__ = ["pack", "prepare_for_training", "unpack"]  # freezing is all that adapters need
KERNEL = "torch decode and matmul"
FLOAT8, BYTES = "float8_e4m3fn", torch.uint8
MOST_EXPONENT = 254  # of E8M0; 255 is NaN
MIDDLE = 128  # of 8-bit codes, where the packed layout has its zero


def quantize_linear(linear: Any, config: MlxOptions, form: Format | None = None) -> MlxLinear:
    """A layer that takes the place of `linear`. form: of the layer; left out, the options'.

    Raises ModelError where it holds NaN or infinity.
    """
    form = config.format if form is None else form
    tensors = encoded(rows_of(linear), form, config)
    return MlxLinear(linear, form, tensors if linear.bias is None else {**tensors, "bias": linear.bias.detach()})


def quantize_embedding(embedding: Any, form: Format, config: MlxOptions, dtype: torch.dtype) -> MlxEmbedding:
    """An embedding that takes the place of a dense one. Raises ModelError where that holds NaN or infinity."""
    return MlxEmbedding(embedding, form, encoded(rows_of(embedding), form, config), dtype)


def quantize_experts(stack: Tensor, form: Format, config: MlxOptions, *, transposed: bool) -> LinearExperts:
    """The experts of a dense tensor (experts, out_features, in_features), the last two the other way round where
    transposed. Raises ModelError as for a layer."""
    matrices = stack.detach().transpose(1, 2) if transposed else stack.detach()
    each = (quantize_linear(_linear(matrix.shape, matrix), config, form) for matrix in matrices)
    return LinearExperts.of(each, len(stack), transposed=transposed)


def encoded(weight: Rows, form: Format, config: MlxOptions) -> dict[str, Tensor]:
    """PARTS of a dense matrix, which is rounded to the dtype of the scales first, as mlx-lm does."""
    dtype, metal = getattr(torch, config.scale_dtype), config.layout == "metal"

    def parts(rows: Tensor) -> dict[str, Tensor]:
        rounded = rows.to(dtype)
        if not is_finite(rounded):
            raise ModelError(f"it holds numbers that {config.scale_dtype} does not: take scale_dtype='bfloat16'")
        return encode(rounded, form, metal=metal)

    return in_bands(weight, parts)


def _linear(shape: Any, weight: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(shape[-1], shape[-2], bias=False, device="meta")
    if weight is not None:
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def stored_parts(shape: tuple[int, ...], form: Format) -> dict[str, Part]:
    """What a checkpoint holds of a weight (..., rows, columns)."""
    *rows, columns = shape
    words, groups = (*rows, columns * form.bits // 32), (*rows, columns // form.group_size)
    if form.mode == "affine":
        return {"weight": Part(words, "uint32"), "scales": Part(groups, "float"), "biases": Part(groups, "float")}
    if form.mode == "nvfp4":
        return {"weight": Part(words, "uint32"), "scales": Part(groups, FLOAT8)}
    codes = Part((*rows, columns), FLOAT8) if form.bits == 8 else Part(words, "uint32")
    return {"weight": codes, "scales": Part(groups, "uint8", 0, MOST_EXPONENT)}


def checked(shape: tuple[int, ...], form: Format, tensors: Mapping[str, Tensor], *, bias: bool) -> dict[str, Tensor]:
    """PARTS of a stored weight (..., rows, columns), and its bias, held against it.

    Raises ModelError for what is missing, has no place, or has other sizes, types or numbers than the format's.
    """
    parts = stored_parts(shape, form) | ({"bias": Part((shape[0],), "float")} if bias else {})
    found = {"biases" if name == "qbiases" else name: tensor for name, tensor in tensors.items()}
    for name, part in parts.items():
        tensor = found.get(name)
        if part.dtype == FLOAT8 and tensor is not None and tensor.dtype in (torch.uint8, torch.uint32):
            found[name] = tensor.contiguous().view(torch.uint8).view(torch.float8_e4m3fn)
    try:
        require_parts(shape, found, parts)
    except ModelError as error:
        raise ModelError(f"its config says that it is {form.name}, and {error}") from error
    as_bytes = ("weight", "scales") if form.mode != "affine" else ("weight",)
    return {
        name: tensor.contiguous().view(BYTES) if name in as_bytes else tensor.contiguous()
        for name, tensor in found.items()
    }


def linear_from_tensors(linear: Any, form: Format, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> MlxLinear:
    """A layer from stored tensors. Raises ModelError as `checked`."""
    own = checked((linear.out_features, linear.in_features), form, tensors, bias=linear.bias is not None)
    return MlxLinear(linear, form, {name: each.to(dtype) if name == "bias" else each for name, each in own.items()})


def experts_from_tensors(
    dense: Tensor, form: Format, tensors: Mapping[str, Tensor], parts: Any, *, transposed: bool, in_turn: bool
) -> LinearExperts:  # fmt: skip
    """The experts that take the place of a tensor (experts, out_features, in_features), or transposed.

    parts: what the names of tensors begin with, of stacks that follow each other along out_features, or whose rows take
    turns. Raises ModelError as `checked`.
    """
    count, rows, columns = (dense.transpose(1, 2) if transposed else dense).shape
    shape = (count, rows // len(parts), columns)
    found: list[dict[str, Tensor]] = []
    for begin in parts:
        inside = {name.removeprefix(begin): each for name, each in tensors.items() if name.startswith(begin)}
        found.append(checked(shape, form, inside, bias=False))
    whole = {name: _joined([each[name] for each in found], in_turn=in_turn) for name in found[0]}
    return LinearExperts(MlxLinear(_linear((rows, columns)), form, {}), whole, transposed=transposed)


def _joined(tensors: Sequence[Tensor], *, in_turn: bool) -> Tensor:
    """(experts, rows, ...) of several, one below the other, or a row of each in turn."""
    return torch.stack(tensors, 2).flatten(1, 2) if in_turn else torch.cat(tensors, 1)


def stack_of(like: ExpertStack, form: Format, tensors: Mapping[str, Tensor]) -> LinearExperts:
    """Experts of PARTS of all of them, in the place of `like`. Raises ModelError as `checked`."""
    own = checked((like.count, *like.shape), form, tensors, bias=False)
    return LinearExperts(MlxLinear(_linear(like.shape), form, {}), own, transposed=like.transposed)


def stored_tensors(module: Any, *, metal: bool = False) -> dict[str, Tensor]:
    """PARTS of a module's weight as a checkpoint has them."""
    parts = {name: tensor.detach() for name in PARTS if (tensor := module._parameters.get(name)) is not None}
    parts["weight"] = parts["weight"].contiguous().view(torch.uint32)
    return {"qbiases" if metal and name == "biases" else name: tensor for name, tensor in parts.items()}


def pack(module: Any) -> PackedWeight:
    """The weight with kernel="packed", of a linear layer or an embedding."""
    form: Format = module.form
    parts = module._parameters
    codes, scales = parts["weight"].detach(), parts["scales"].detach()
    if form.mode != "affine":
        steps = scale_numbers(scales, form).bfloat16()
        if form.bits == 8:
            return pack_weight(codes.view(torch.float8_e4m3fn), steps, form.group_size)
        return pack_weight(unpacked_bits(codes, 4), steps, form.group_size, table=torch.tensor(E2M1))
    minima, numbers = parts["biases"].detach().float(), unpacked_bits(codes, form.bits)
    if form.bits == 8:
        numbers, minima = numbers ^ MIDDLE, minima + MIDDLE * scales.float()
    if form.bits > 4:
        numbers = numbers.view(torch.int8)
    return pack_weight(numbers, scales, form.group_size, minima=minima)


def unpack(weight: WeightCodes, config: MlxOptions) -> dict[str, Tensor]:
    """As `stored_parts` names them. A bias is a zero point times its scale, in the dtype of the scales."""
    form = form_of(weight.name, config)
    held = weight.in_order().in_groups(form.group_size)
    if form.mode == "affine":
        scales = held.integers(form.bits).scales_as(getattr(torch, config.scale_dtype))
        least = -held.zero_points() * scales.float() if held.minima is None else held.minima
        codes = held.codes
        if form.bits == 8:
            codes, least = unsigned(codes), least - MIDDLE * scales.float()
        if not fits(least, biases := least.to(scales.dtype)):
            raise Misfit("minima", f"its minima, to {least.abs().max():.3g}, have no place in {config.scale_dtype}")
        return {"weight": _words(codes, form.bits), "scales": scales, "biases": biases}
    if form.bits == 8:
        if held.kind != "floats":
            raise Misfit("bits", f"its codes are {held.kind}, and floats of 8 bits (E4M3) are held")
        return {"weight": held.codes.view(torch.uint8).view(torch.uint32), "scales": exponents(held.scales)}
    codes = fp4_codes(weight, form.group_size)
    if form.mode == "mxfp4":
        return {"weight": _words(codes, 4), "scales": exponents(held.scales)}
    scales = held.scales.to(torch.float8_e4m3fn)
    if not torch.equal(scales.float(), held.scales.float()):
        raise Misfit("scale dtype", "its scales are E4M3 times a factor for all, which MLX's NVFP4 has not")
    return {"weight": _words(codes, 4), "scales": scales.view(torch.uint8)}


def form_of(module: str, config: MlxOptions) -> Format:
    """The format that a module has with these options, by its full name."""
    named = dict(config.layers).get(module)
    return config.format if named is None else FORMATS[named]


def _words(codes: Tensor, bits: int) -> Tensor:
    return packed_bits(codes, bits).contiguous().view(torch.uint32)


def describe_layers(model: Any) -> list[LayerInfo]:
    skipped = model.config.quantization_config[OWN]["skip"]
    layers = describe(model, _quantized(model), skipped=skipped)
    head = model.get_output_embeddings()
    heads = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    return [
        msgspec.structs.replace(layer, role="head") if layer.quantized and layer.name in heads else layer
        for layer in layers
    ]


def _quantized(model: Any) -> Callable[[str, Any], Quantized | None]:
    """What is known of a module. A tied head's storage is the embedding's."""
    first: dict[int, str] = {}
    for kind in (MlxEmbedding, MlxLinear):
        for name, module in model.named_modules():
            if isinstance(module, kind):
                first.setdefault(id(module.weight), name)

    def quantized(name: str, module: Any) -> Quantized | None:
        if isinstance(module, LinearExperts):
            form = module.like.form
            return Quantized(module.dense_shape, form.bits, form.scheme, KERNEL, tensor="", role="experts")
        if not isinstance(module, (MlxLinear, MlxEmbedding)) or first[id(module.weight)] != name:
            return None
        form, is_table = module.form, isinstance(module, MlxEmbedding)
        sizes = ("num_embeddings", "embedding_dim") if is_table else ("out_features", "in_features")
        role: Role = "embedding" if is_table else "linear"
        shape = tuple(getattr(module, size) for size in sizes)
        return Quantized(shape, form.bits, form.scheme, KERNEL, dense=("bias", "embed_scale"), role=role)

    return quantized
