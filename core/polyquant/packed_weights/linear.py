"""A linear layer on the packed runtime, and the operator that `torch.compile` sees. Imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from polyquant.packed_weights import kernels
from polyquant.packed_weights.format import ROWS
from polyquant.packed_weights.frozen import (
    PackedLinear,
    frozen_linear,
    needs_gradient,
    product_of_pieces,
    rows_at_a_time,
)
from polyquant.packed_weights.weight import PARTS, PackedWeight
from polyquant.types import PackedFormat

MOST_INPUTS = 96
"""For more, decoding some rows at a time and torch's own product are faster: measured on AVX2, 576 to 8192 rows."""
MANY_AS_INTEGERS = ("avx512", "avx2")
"""Instruction sets with which that is not so for 16-bit integers, however many the inputs.

Of 512, on a core of an EPYC of the fourth generation, a billion multiplications a second in layers of SmolLM2-135M and
of 3072 to 8192 rows: 91 and 93 with AVX-512 in NF4, 56 and 54 with AVX2; torch without the decoding 43 and 42.
"""


Gathered = TypeVar("Gathered")
Multiplied = tuple[PackedWeight, Any]
"""A weight, and the same as the kernels take it: None where plain torch multiplies."""
CODES = "qweight"
"""What the codes are called in a layer: PEFT looks for where a layer is by this name."""


class Holding(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Parts of packed weights as parameters, gathered once for as long as they stay where they are."""

    shape: tuple[int, int]
    format: PackedFormat
    zero: float

    def _hold(self, weight: PackedWeight, scheme: str, bits: float) -> None:
        """scheme, bits: what the weights are called."""
        self.shape, self.format, self.zero = weight.shape, weight.format, weight.zero
        self.scheme, self.bits = scheme, bits
        self.layout = msgspec.json.encode(weight.format).decode()  # for the operator, which takes texts

    def _gathered(self, make: Callable[[dict[str, Tensor]], Gathered]) -> Gathered:
        """What `make` makes of the parts by their names; made anew where the tensors have gone elsewhere."""
        tensors = self._parameters
        places = tuple(tensor.data_ptr() for tensor in tensors.values() if tensor is not None)
        known = self.__dict__.get("_known")
        if known is None or known[0] != places:
            own = {"codes" if name == CODES else name: tensor for name, tensor in tensors.items()}
            parts = {name: tensor.detach() for name in PARTS if (tensor := own.get(name)) is not None}
            known = self.__dict__["_known"] = (places, make(parts))
        gathered: Gathered = known[1]
        return gathered

    def _multiplied(self, parts: dict[str, Tensor]) -> Multiplied:
        """A weight of these parts, and as the kernels take it."""
        weight = PackedWeight(shape=self.shape, format=self.format, zero=self.zero, **parts)
        return weight, struct_of(weight)

    def _apply(self, *arguments: Any, **more: Any) -> Any:
        self.__dict__.pop("_known", None)  # which would hold the tensors that it is moved away from
        return super()._apply(*arguments, **more)

    def __getstate__(self) -> dict[str, Any]:
        """Without the addresses, which are no other copy's."""
        return {name: value for name, value in self.__dict__.items() if name != "_known"}


class Repacked(Holding):
    """A module's packed weight."""

    @property
    def packed(self) -> PackedWeight:
        """The weight, whose tensors are the module's own."""
        return self._as_multiplied()[0]

    def _as_multiplied(self) -> Multiplied:
        """The weight, and as the kernels take it."""
        return self._gathered(self._multiplied)


def named(weight: PackedWeight) -> dict[str, Tensor]:
    """The parts of a weight as a module calls them."""
    return {CODES if name == "codes" else name: part for name, part in weight.parts.items()}


class RepackedLinear(Repacked, PackedLinear):
    """A linear layer whose weight, of any format, lies in the packed layout."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None, scheme: str, bits: float) -> None:
        """bias: (out_features,), or None. scheme, bits: what its backend calls the weights."""
        tensors = named(weight)
        super().__init__(weight, tensors if bias is None else {**tensors, "bias": bias.detach()})
        self._hold(weight, scheme, bits)
        self.activations = "int16"

    is_tied = False  # whether its tensors are the embedding's

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features), in any floating point. Returns (..., out_features) in it."""
        if torch.compiler.is_compiling() and not needs_gradient(input):
            parts = {name: self._parameters.get(name) for name in (*PARTS[2:], "bias")}
            output: Tensor = packed_linear(
                input, self.qweight, self.scales, **parts, zero=self.zero, rows=self.out_features,
                layout=self.layout, activations=self.activations,
            )  # fmt: skip
            return output
        if needs_gradient(input):
            return frozen_linear(input, self.pieces, self.bias, self._product)
        return self._product(input)

    def dequantize(self) -> Tensor:
        """The weight, float32 (out_features, in_features)."""
        return torch.cat(list(self.pieces()))

    def pieces(self) -> Iterator[Tensor]:
        """The weight, some rows at a time: float32 (rows, in_features)."""
        return decoded(*self._as_multiplied())

    def _product(self, input: Tensor) -> Tensor:
        weight, struct = self._as_multiplied()
        return product(input, weight, struct, self.bias, self.activations)


def struct_of(weight: PackedWeight) -> Any:
    """A weight as the kernels take it; None where plain torch multiplies."""
    on_kernels = weight.codes.device.type == "cpu" and kernels.library() is not None
    return kernels.weight_struct(weight) if on_kernels else None


def decoded(weight: PackedWeight, struct: Any) -> Iterator[Tensor]:
    """A weight, some rows at a time: float32 (rows, in_features). struct: for the kernels; None: plain torch."""
    rows, columns = weight.padded
    step = max(ROWS, rows_at_a_time(columns, weight.codes.device) // ROWS * ROWS)
    for start in range(0, weight.shape[0], step):
        end = min(start + step, rows)
        if struct is None:
            yield weight.decode(start, end)
            continue
        piece = torch.empty(end - start, columns)
        threads, address = torch.get_num_threads(), kernels.address_of(struct)
        kernels.require(kernels.functions().pq_decode(address, start, end - start, piece.data_ptr(), 0, threads))
        yield weight.by_inputs(piece)[: weight.shape[0] - start]


def are_few(input: Tensor, most: float = MOST_INPUTS) -> bool:
    """Whether the kernels' product takes these inputs, and is the faster one: for so many."""
    count = input.numel() // max(1, input.shape[-1])
    return count <= most and kernels.type_number(input.dtype) is not None and input.device.type == "cpu"


def most_inputs(weight: PackedWeight, activations: str) -> float:
    """For how many inputs the kernels' product is the faster one."""
    in_integers = activations == "int16" and weight.format.kind != "float8" and (
        weight.format.kind != "codebook4" or weight.group % 32 == 0
    )  # fmt: skip
    return math.inf if in_integers and kernels.set_in_use() in MANY_AS_INTEGERS else MOST_INPUTS


def product(input: Tensor, weight: PackedWeight, struct: Any, bias: Tensor | None, activations: str) -> Tensor:
    """input @ weight.T + bias. input: (..., in_features); struct: for the kernels; None: plain torch."""
    count = input.numel() // max(1, input.shape[-1])
    if struct is None or not are_few(input, most_inputs(weight, activations)):
        return product_of_pieces(input, partial(decoded, weight, struct), bias)
    rows, columns = weight.padded
    inputs = input.detach().reshape(count, input.shape[-1])
    if columns != inputs.shape[1]:
        inputs = functional.pad(inputs, (0, columns - inputs.shape[1]))
    if bias is not None:
        bias = functional.pad(bias.detach().float(), (0, rows - len(bias)))
    outputs = by_kernels(struct, inputs, rows, bias, activations)
    return outputs[:, : weight.shape[0]].contiguous().view(*input.shape[:-1], weight.shape[0])


def by_kernels(struct: Any, inputs: Tensor, rows: int, bias: Tensor | None, activations: str) -> Tensor:
    """The kernels' product: inputs (count, columns) of a type that they take, bias float32 (rows). As (count, rows)."""
    number, inputs = kernels.type_number(inputs.dtype), inputs.contiguous()
    outputs = inputs.new_empty(len(inputs), rows)
    bias = None if bias is None else bias.contiguous()
    status = kernels.functions().pq_linear(
        kernels.address_of(struct), inputs.data_ptr(), number, len(inputs), outputs.data_ptr(), number,
        None if bias is None else bias.data_ptr(), kernels.ACTIVATIONS[activations], torch.get_num_threads(),
    )  # fmt: skip
    kernels.require(status)
    return outputs


@torch.library.custom_op("polyquant::packed_linear", mutates_args=())  # type: ignore[untyped-decorator]
def packed_linear(
    input: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, minima: Tensor | None, table: Tensor | None,
    order: Tensor | None, column_scales: Tensor | None, outer_scales: Tensor | None, outer_minima: Tensor | None,
    row_scales: Tensor | None, bias: Tensor | None, zero: float, rows: int, layout: str, activations: str,
) -> Tensor:  # fmt: skip
    """A product, opaque to `torch.compile`. input: (..., in_features); layout: as JSON. Returns (..., rows)."""
    weight = PackedWeight(
        shape=(rows, input.shape[-1]), codes=codes, scales=scales, zeros=zeros, minima=minima, table=table,
        order=order, column_scales=column_scales, outer_scales=outer_scales, outer_minima=outer_minima,
        row_scales=row_scales, zero=zero, format=msgspec.json.decode(layout, type=PackedFormat),
    )  # fmt: skip
    return product(input, weight, struct_of(weight), bias, activations)


@packed_linear.register_fake  # type: ignore[untyped-decorator]
def _(
    input: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, minima: Tensor | None, table: Tensor | None,
    order: Tensor | None, column_scales: Tensor | None, outer_scales: Tensor | None, outer_minima: Tensor | None,
    row_scales: Tensor | None, bias: Tensor | None, zero: float, rows: int, layout: str, activations: str,
) -> Tensor:  # fmt: skip
    return input.new_empty(*input.shape[:-1], rows)
