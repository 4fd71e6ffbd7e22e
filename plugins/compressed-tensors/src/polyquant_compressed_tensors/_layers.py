"""A Linear module that keeps compressed-tensors' packed tensors and multiplies with what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from polyquant.errors import ModelError
from polyquant.plugin import LayerInfo
from polyquant.plugin.activations import of_layer
from polyquant.plugin.codes import unpacked_bits
from polyquant.plugin.layers import (
    LinearExperts,
    PackedLinear,
    Part,
    Quantized,
    describe,
    layer_tensors,
    needs_gradient,
    prepare_for_training,
)
from polyquant.plugin.parts import MOST_EXPONENT, dtype_name

from polyquant_compressed_tensors._decode import decode, spread
from polyquant_compressed_tensors._pack import pack, unpack
from polyquant_compressed_tensors.arguments import BLOCK, rounded_activations
from polyquant_compressed_tensors.formats import MX, group_of, is_ignored
from polyquant_compressed_tensors.options import CompressedTensorsOptions
from polyquant_compressed_tensors.planning import (
    SCALE,
    WORD_BITS,
    checkpoint_tensors,
    packed_scale,
    uses_int8pack,
)

__all__ = ["pack", "prepare_for_training", "unpack"]  # freezing is all that adapters need
KERNEL = "decode and torch matmul"
ROUNDED_KERNEL = "activations rounded, decode and torch matmul"
INT8_KERNEL = f"torch._weight_int8pack_mm, above 8 rows {KERNEL}"
INT8_ROWS = 8  # for more rows one decoding of the weight is faster


class CompressedLinear(PackedLinear):
    """A Linear module whose weight is unpacked anew in each forward pass, and never kept.

    transformers and compressed-tensors themselves decompress the whole model in its first forward pass.
    weight_packed: int4 in int32 words, fp4 two a byte, int8 and fp8 a byte each; (out_features, ...).
    """

    def __init__(
        self, linear: Any, config: CompressedTensorsOptions, dtype: torch.dtype, tensors: Mapping[str, torch.Tensor],
        packed_scale: torch.dtype, matrices: int = 1,
    ) -> None:  # fmt: skip
        """packed_scale: the dtype of its scales in polyquant's packed layout. matrices: how many its rows are."""
        super().__init__(linear, tensors)
        self.compute_dtype, self.options = dtype, config
        if (how := rounded_activations(config)) is not None:
            self.rounding = of_layer(how)
        self.packed_scale, self.matrices = packed_scale, matrices
        self.sparse = "bitmask" in tensors
        self.int8pack = uses_int8pack((self.out_features, self.in_features), config) and not self.sparse
        self.kernel = INT8_KERNEL if self.int8pack else ROUNDED_KERNEL if self.rounds_activations else KERNEL

    @property
    def qweight(self) -> torch.Tensor:
        """The packed weight, under the name by which PEFT finds the device of a packed layer."""
        return self.weight_packed

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.numel() // self.in_features
        if self.int8pack and 0 < rows <= INT8_ROWS and not needs_gradient(input):
            flat = self.inputs(input).reshape(rows, self.in_features).contiguous()
            output = torch._weight_int8pack_mm(flat, self.weight_packed, self.weight_scale.flatten())
            output = output if self.bias is None else output + self.bias
            return output.view(*input.shape[:-1], self.out_features)
        return super().forward(input)

    @property
    def static_scale(self) -> torch.Tensor | None:
        """What the checkpoint has for activations, the same for all matrices; of nvfp4 scales are divided by it."""
        stored = self._parameters.get("input_scale", self._parameters.get("input_global_scale"))
        return None if stored is None else stored[:1]

    def dequantize(self) -> torch.Tensor:
        """The weight in the compute dtype, (out_features, in_features)."""
        held = {name.removeprefix("weight_"): tensor.detach() for name, tensor in self._tensors() if name != "bias"}
        codes = spread(held["packed"], held["bitmask"], self.in_features) if self.sparse else held["packed"]
        return decode(
            self.options, (self.out_features, self.in_features), self.compute_dtype, codes, held.get("scale"),
            held.get("zero_point"), held.get("global_scale"),
        )  # fmt: skip

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, tensor) for name, tensor in self._parameters.items() if tensor is not None]

    def checkpoint_tensors(self, *, plain: bool) -> dict[str, torch.Tensor]:
        """Tensors as a checkpoint stores them. plain: 8-bit weights a byte each, not in words."""
        tensors = {name: tensor.detach() for name, tensor in self._tensors()}
        if self.sparse:
            tensors["compressed"] = tensors.pop("weight_packed")
            return {**tensors, "shape": torch.tensor([[self.out_features], [self.in_features]])}
        if plain:
            tensors["weight"] = tensors.pop("weight_packed")
        elif self.options.weights == "int8":
            tensors["weight_packed"] = pack_to_int32(tensors["weight_packed"], 8)
            if "weight_zero_point" in tensors:
                tensors["weight_zero_point"] = pack_to_int32(tensors["weight_zero_point"], 8, packed_dim=0)
        if not plain and self.options.weights.startswith("int"):
            tensors["weight_shape"] = stored_shape(self)
        return tensors


def packed_linear(
    linear: torch.nn.Linear, config: CompressedTensorsOptions, dtype: torch.dtype,
    tensors: Mapping[str, torch.Tensor], *, plain: bool, matrices: int = 1,
) -> CompressedLinear:  # fmt: skip
    """The layer that takes the place of `linear`. Raises ModelError where a tensor is missing, astray or misshapen.

    matrices: as many of an expert follow each other in its rows.
    """
    shape = (linear.out_features, linear.in_features)
    sparse = "compressed" in tensors or config.weights == "sparse"
    expected = checkpoint_tensors(shape, config, plain=plain, matrices=matrices, sparse=sparse)
    if matrices > 1:
        _require_joined(shape[0] // matrices, config, tensors, plain=plain)
    held = layer_tensors(linear, tensors, {name: Part(*part, *_range(name, config)) for name, part in expected.items()})
    said = [shape[0] // matrices, shape[1]] * matrices
    if "weight_shape" in held and held.pop("weight_shape").tolist() != said:
        raise ModelError(f"weight_shape says {tensors['weight_shape'].tolist()}, the model has {said}")
    if sparse:
        _require_half(held, shape)
        held["weight_packed"] = held.pop("compressed")
        del held["shape"]
    stored = held.get("weight_scale", held.get("weight_packed"))
    scale = packed_scale(config.weights, dtype_name(stored), str(dtype).removeprefix("torch."))
    return CompressedLinear(linear, config, dtype, _held(held, config, shape, dtype), getattr(torch, scale), matrices)


def _require_half(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> None:
    """Raises ModelError where a mask does not choose half of each row."""
    if (said := tensors["shape"].flatten().tolist()) != list(shape):
        raise ModelError(f"shape says {said}, the model has {list(shape)}")
    chosen = unpacked_bits(tensors["bitmask"], 1).sum(1)
    if bool((chosen != shape[1] // 2).any()):
        raise ModelError(
            f"bitmask chooses {int(chosen.min())} to {int(chosen.max())} of the {shape[1]} weights of a row, and "
            f"{shape[1] // 2} are stored; the checkpoint is damaged"
        )


def stored_shape(layer: CompressedLinear) -> torch.Tensor:
    """weight_shape of a layer, of each of its matrices."""
    return torch.tensor([layer.out_features // layer.matrices, layer.in_features] * layer.matrices)


def _require_joined(
    rows: int, config: CompressedTensorsOptions, tensors: Mapping[str, torch.Tensor], *, plain: bool
) -> None:
    """Raises ModelError where matrices of so many rows cannot be multiplied as one: it is the experts' of a model."""
    size = BLOCK[0] if config.strategy == "block" else 1
    if not config.symmetric and not plain:
        size = WORD_BITS // int(config.weight_bits)
    if rows % size:
        raise ModelError(
            f"its experts have matrices of {rows} rows, which are multiplied together here, and scales or zero points "
            f"of {size} rows in one; take the dense checkpoint"
        )
    for name in ("input_global_scale", "input_scale"):
        if name in tensors and bool((tensors[name] != tensors[name].flatten()[0]).any()):
            raise ModelError(
                f"its two matrices have {name} {tensors[name].flatten().tolist()}, and are multiplied together here, "
                "with activations that are rounded once; take the dense checkpoint"
            )


def _range(name: str, config: CompressedTensorsOptions) -> tuple[float | None, float | None]:
    """Least and greatest value of a tensor, where not all that its dtype can hold are possible."""
    if name == "weight_scale" and config.weights in MX:
        return 0, MOST_EXPONENT
    divides = ("weight_global_scale", "input_global_scale", "input_scale")
    return (torch.finfo(torch.float32).tiny, None) if name in divides else (None, None)


def _held(
    tensors: Mapping[str, torch.Tensor], config: CompressedTensorsOptions, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors as they are kept: 8-bit weights out of their words, scales and bias in `dtype`."""
    held = dict(tensors)
    if "weight" in held:
        held["weight_packed"] = held.pop("weight")
    elif config.weights == "int8" and "bitmask" not in held:
        held["weight_packed"] = unpack_from_int32(held["weight_packed"], 8, torch.Size(shape))
        if "weight_zero_point" in held:
            zeros = torch.Size((shape[0], held["weight_scale"].shape[1]))
            held["weight_zero_point"] = unpack_from_int32(held["weight_zero_point"], 8, zeros, packed_dim=0)
    if config.weights == "sparse":
        return {name: (each if name == "bitmask" else each.to(dtype)).contiguous() for name, each in held.items()}
    floating = checkpoint_tensors(shape, config, plain=True)["weight_scale"].dtype == SCALE
    cast = ("bias", "input_scale", *(["weight_scale"] if floating else []))
    return {name: (tensor.to(dtype) if name in cast else tensor).contiguous() for name, tensor in held.items()}


def describe_layers(model: Any) -> list[LayerInfo]:
    stored, head = model.config.quantization_config, model.get_output_embeddings()
    ignore, groups = stored.get("ignore") or (), stored.get("config_groups")
    if not groups:  # sparse alone
        return describe(model, _quantized, skipped=stored["sparsity_config"].get("ignore") or ())
    skipped = [
        name
        for name, module in model.named_modules()
        if module is not head and (is_ignored(name, ignore) or group_of(name, groups) is None)
    ]
    return describe(model, _quantized, skipped=skipped)


def _quantized(name: str, module: Any) -> Quantized | None:
    if isinstance(module, LinearExperts):
        like = module.like
        return Quantized(
            module.dense_shape, like.options.weight_bits, like.options.scheme, like.kernel, tensor="", role="experts"
        )  # fmt: skip
    if not isinstance(module, CompressedLinear):
        return None
    options = module.options
    return Quantized(
        (module.out_features, module.in_features), options.weight_bits, options.scheme, module.kernel
    )  # fmt: skip
