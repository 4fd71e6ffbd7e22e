"""How layers are made, from a dense layer or from a checkpoint's tensors, and what they store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from polyquant.errors import Misfit, ModelError
from polyquant.plugin import LayerInfo, experts
from polyquant.plugin.floats import E2M1, MOST_E2M1, NAN_E8M0, pairs_of_codes
from polyquant.plugin.layers import (
    LinearExperts,
    PackedWeight,
    Part,
    Quantized,
    WeightCodes,
    describe,
    layer_tensors,
    pack_weight,
    prepare_for_training,
    rows_of,
)
from polyquant.plugin.packing import e4m3_scales, exponents, fp4_codes
from torch import Tensor
from torch.nn import functional

from polyquant_mx._decode import factors, outer_of_rows, wide_codes
from polyquant_mx._modules import KERNEL, MxLinear
from polyquant_mx._quantize import quantized
from polyquant_mx.formats import Layout, Scheme
from polyquant_mx.options import MxOptions

__all__ = ["prepare_for_training"]  # freezing is all that adapters need
REPEATS = {"backward_rotation": "rotation", "input_scale": "outer_scale"}
"""What FP-Quant stores twice, for layers that its own are trained as."""
MATRICES = 2
"""An expert's gate and up are one layer here, and may have a scale each."""
BELIEVED = 1024.0
"""No weight is larger: ModelOpt multiplies with a scale that compressed-tensors, with the reciprocal, divides by."""


def describe_layers(model: Any) -> list[LayerInfo]:
    return describe(model, _quantized, skipped=model.config.quantization_config["skip_modules"])


def quantize_linear(linear: Any, config: MxOptions) -> MxLinear:
    """A layer that takes the place of `linear`. Raises ModelError where that holds NaN or infinity."""
    return linear_of(linear, config.usual_scheme)


def linear_of(linear: Any, scheme: Scheme) -> MxLinear:
    """As `quantize_linear`, in a format of its own."""
    bias = {} if linear.bias is None else {"bias": linear.bias}
    return MxLinear(linear, scheme, {**quantized(rows_of(linear), scheme), **bias})


def experts_of(dense: Tensor, scheme: Scheme, *, transposed: bool) -> LinearExperts:
    """A stack of all experts. dense: (experts, out_features, in_features), transposed the last two the other way."""

    def one(number: int) -> MxLinear:
        matrix = dense[number].detach()
        rows = (matrix.T if transposed else matrix).contiguous()
        linear = torch.nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(rows, requires_grad=False)
        try:
            return linear_of(linear, scheme)
        except ModelError as error:
            raise ModelError(f"expert {number}: {error}") from error

    return LinearExperts.of((one(number) for number in range(len(dense))), len(dense), transposed=transposed)


def linear_from_tensors(
    linear: Any, scheme: Scheme, layout: Layout, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> MxLinear:
    """A layer from a checkpoint's tensors. linear: the dense one. Raises ModelError where they are wrong."""
    found = checked(linear, scheme, layout.linear, tensors)
    if linear.bias is not None:
        found["bias"] = found["bias"].to(dtype)
    return MxLinear(linear, scheme, found)


def experts_from_tensors(
    dense: Tensor, scheme: Scheme, layout: Layout, tensors: Mapping[str, Tensor], *, transposed: bool
) -> LinearExperts:
    """A stack of all experts from a checkpoint's tensors, which have one more axis. dense: on the meta device.

    Raises ModelError where they are wrong, or not of as many experts.
    """
    count, rows, columns = dense.shape[0], *(dense.shape[:0:-1] if transposed else dense.shape[1:])
    linear = torch.nn.Linear(columns, rows, bias=False, device="meta")
    if few := [f"{name} has {len(part) if part.dim() else 0}" for name, part in sorted(tensors.items())
               if part.dim() == 0 or len(part) != count]:  # fmt: skip
        raise ModelError(f"there are {count} experts, and {', '.join(few)}")
    each = [checked(linear, scheme, layout.stacked, {name: part[number] for name, part in tensors.items()})
            for number in range(count)]  # fmt: skip
    whole = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    whole["qweight"] = whole["qweight"].view(torch.uint8)
    return LinearExperts(MxLinear(linear, scheme, each[0]), whole, transposed=transposed)


def experts_one_by_one(dense: Tensor, scheme: Scheme, layout: Layout, tensors: Mapping[str, Tensor]) -> LinearExperts:
    """A stack of experts that a checkpoint holds one by one; gate and up become one.

    dense: (experts, out_features, in_features), on the meta device. tensors: as `experts.part_of` names them.
    Raises ModelError where they are wrong, or not all there.
    """

    def make(linear: Any, whole: dict[str, Tensor]) -> MxLinear:
        name = layout.linear.get("column_scales", "")
        if name in whole and len(whole[name]) == 2 * linear.in_features:
            first, second = whole[name].chunk(2)
            if not torch.equal(first, second):
                raise ModelError(f"{name} of its gate is another than that of up, and they have one input")
            whole[name] = first
        return MxLinear(linear, scheme, checked(linear, scheme, layout.linear, whole))

    return experts.stack(dense, tensors, make)


def stored_one_by_one(stack: LinearExperts, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a stack as `experts.as_stored` takes them: by their names in a file, those of all experts."""
    scheme, found = stack.like.scheme, dict[str, Tensor]()
    for name, tensor in stack.named_parameters():
        whole = tensor.detach()
        if name == "column_scales" and stack.shape[0] != stack.shape[1]:
            whole = whole.repeat(1, 2)
        found[names[name]] = as_stored(name, whole, scheme, stack.count)
    return found


def checked(linear: Any, scheme: Scheme, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors of one layer by their names here, in their shapes here. Raises ModelError."""
    shape = (linear.out_features, linear.in_features)
    stored = {name: _as_stored(name, tensor, scheme, names, shape) for name, tensor in tensors.items()}
    parts: dict[str, Part] = {}
    for name, (whole, dtype) in scheme.parts(shape).items():
        size = whole
        if name == "outer_scale" or (name == "scales" and not scheme.rows):
            number = stored[names[name]].numel() if names[name] in stored else 1
            size = (number, *whole[1:]) if number and shape[0] % number == 0 and number <= MATRICES else whole
        floats = name not in ("qweight", "scales") or (name == "scales" and scheme.scales == "float32")
        most = NAN_E8M0 - 1 if name == "scales" and scheme.scales == "e8m0" else None
        parts[names[name]] = Part(size, "float" if floats else dtype, most=most)
    kept = {"column_scales": (shape[1],), "input_scale": None, "backward_rotation": None}
    for name, length in kept.items():
        if name in names:
            parts[names[name]] = Part(length, "float", optional=True)
    found = layer_tensors(linear, stored, parts)
    own = {short: found[name] for short, name in names.items() if name in found}
    for name, tensor in own.items():
        if name not in ("qweight", "scales", "column_scales") or (name == "scales" and scheme.scales == "float32"):
            own[name] = tensor.float()
    for name, same in REPEATS.items():
        if scheme.rotation and name in own and torch.equal(own[name], own[same]):
            del own[name]  # it is written again by `stored_tensors`
    if scheme.outer == "multiplies":
        _require_multiplied(own, names)
    return own if linear.bias is None else {**own, "bias": found["bias"]}


def stored_tensors(layer: MxLinear, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a layer under a checkpoint's names, in its shapes and dtypes."""
    held = {name: layer.part(name) for name in names}
    for name, same in REPEATS.items():
        if layer.scheme.rotation and held[name] is None:  # FP-Quant's own layers ask for it
            held[name] = layer._parameters[same].detach().clone()
    return {names[name]: as_stored(name, tensor, layer.scheme) for name, tensor in held.items() if tensor is not None}


def as_stored(name: str, tensor: Tensor, scheme: Scheme, count: int = 0) -> Tensor:
    """A layer's tensor, or that of so many experts, as checkpoints have it: whole scales without axes of length 1."""
    lead = (count,) if count else ()
    if name == "qweight":
        return tensor.view(torch.float8_e4m3fn) if scheme.codes == "e4m3" else tensor
    if name in ("outer_scale", "input_scale") and not scheme.rotation:
        return tensor.reshape(lead) if tensor.numel() <= max(1, count) else tensor
    if name == "scales" and scheme.scales == "float32" and not scheme.columns:
        return tensor.reshape(lead if tensor.numel() <= max(1, count) else (*lead, -1))
    return tensor


def pack(module: MxLinear) -> PackedWeight:
    """Raises ModelError for weights that are NaN, and scales of 8 bits that are."""
    scheme, of_rows = module.scheme, None
    if scheme.scales == "e4m3":
        scales, of_rows = module.scales.detach(), outer_of_rows(module, 0, module.out_features)
    else:
        scales = factors(module)
        scales = scales.to(torch.bfloat16) if scheme.scales == "e8m0" else scales
    codes, columns = wide_codes(module), module.part("column_scales")
    table = torch.tensor(E2M1) if scheme.codes == "e2m1" else None
    if scheme.codes == "int4":
        return pack_weight(codes ^ 8, scales, scheme.columns, zero=8, column_scales=columns)
    return pack_weight(
        codes, scales, scheme.columns or -1, table=table, column_scales=columns, row_scales=of_rows
    )  # fmt: skip


def unpack(weight: WeightCodes, config: MxOptions) -> dict[str, Tensor]:
    """MXFP4 and NVFP4 under their checkpoints' names. Raises Misfit for what has no place in the format."""
    scheme, names = config.usual_scheme, config.layout.linear
    if scheme.codes != "e2m1" or getattr(config, "layers", ()):
        raise Misfit("bits", f"{scheme.name}, and formats of single layers, are made of dense weights alone")
    codes = fp4_codes(weight, scheme.columns)
    parts = {"qweight": pairs_of_codes(functional.pad(codes, (0, -codes.shape[1] % scheme.columns)))}
    scales = weight.in_groups(scheme.columns).scales
    if scheme.scales == "e8m0":
        parts["scales"] = exponents(scales)
    else:
        parts["scales"], parts["outer_scale"] = e4m3_scales(scales, divides=False)
    stored = {names[name]: as_stored(name, part, scheme) for name, part in parts.items()}
    return {name: in_file(name, tensor, config) for name, tensor in stored.items()}


def in_file(name: str, tensor: Tensor, config: MxOptions) -> Tensor:
    """MXFP4 lies in blocks of 16 bytes; transformers knows MXFP8's scales by their type."""
    if config.method == "mxfp4" and name.endswith("_blocks"):
        return tensor.unflatten(-1, (-1, 16))
    if config.method == "mxfp8" and name.endswith("_scale_inv"):
        return tensor.view(torch.float8_e8m0fnu)
    if config.method == "fp_quant" and name.endswith(".scales"):
        return tensor.view(torch.uint8)
    return tensor


def _as_stored(name: str, tensor: Tensor, scheme: Scheme, names: Mapping[str, str], shape: tuple[int, int]) -> Tensor:
    """A checkpoint's tensor, where it may look otherwise than the one here: blocks of 16 bytes, E8M0 under its type."""
    if name == names["qweight"] and scheme.codes == "e2m1":
        if tensor.dtype == torch.int8:
            tensor = tensor.view(torch.uint8)
        if tensor.dim() == 3 and tensor.shape[-1] == scheme.columns // 2:
            return tensor.flatten(1)
    if name == names["scales"] and scheme.scales == "e8m0" and tensor.dtype == torch.float8_e8m0fnu:
        return tensor.view(torch.uint8)
    if name == names["scales"] and scheme.rotation:
        if scheme.scales == "e4m3" and tensor.dtype == torch.uint8:
            tensor = tensor.view(torch.float8_e4m3fn)
        if tensor.dim() == 2:  # filled up to what a matrix unit reads
            return tensor[: shape[0], : -(-shape[1] // scheme.columns)]
    return tensor


def _require_multiplied(own: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Raises ModelError where the scale of a matrix is zero or less, or the reciprocal of what it is to be."""
    outer = float(own["outer_scale"].max())
    largest = MOST_E2M1 * float(own["scales"].float().max()) * outer
    if not outer > 0 or largest > BELIEVED:
        raise ModelError(
            f"{names['outer_scale']} is {outer:.4g}, and weights would be up to {largest:.4g}: ModelOpt's is "
            "multiplied with, and compressed-tensors' weight_global_scale, its reciprocal, divided by; this one is no "
            "scale to multiply with, so the file mixes the two or is damaged"
        )


def _quantized(name: str, module: Any) -> Quantized | None:
    if isinstance(module, MxLinear):
        shape: tuple[int, ...] = (module.out_features, module.in_features)
        return Quantized(shape, module.scheme.bits, module.scheme.name, KERNEL)
    if isinstance(module, LinearExperts):
        like = module.like
        return Quantized(module.dense_shape, like.scheme.bits, like.scheme.name, KERNEL, tensor="", role="experts")
    return None
