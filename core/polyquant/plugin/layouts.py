"""Packed layouts of GPTQ and AWQ: the tensors of one linear layer, in checkpoints and in torch's int4 matmul.

Shapes of a layer are (out_features, in_features), as torch.nn.Linear has them. A group size of -1 is one group for all
of in_features; a last group may be shorter than the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod
from typing import NamedTuple

from polyquant.plugin.planning import unfit
from polyquant.types import PackedFormat, WeightInfo

WORD_BITS = 32  # packed values lie in int32 words


class Packed(NamedTuple):
    """One tensor of a packed layer."""

    shape: tuple[int, ...]
    item_bytes: int

    @property
    def nbytes(self) -> int:
        """Size of its storage."""
        return prod(self.shape) * self.item_bytes


def group_count(in_features: int, group_size: int) -> int:
    """Groups along in_features, each with a scale and a zero point."""
    return 1 if group_size == -1 else ceil(in_features / group_size)


def gptq_tensors(shape: tuple[int, ...], bits: int, group_size: int, *, scale_bytes: int = 2) -> dict[str, Packed]:
    """qweight, qzeros, scales and g_idx of a GPTQ checkpoint: words run down in_features. bits: 2, 3, 4 or 8."""
    out_features, in_features = shape
    groups = group_count(in_features, group_size)
    return {
        "qweight": Packed((ceil(in_features * bits / WORD_BITS), out_features), 4),
        "qzeros": Packed((groups, ceil(out_features * bits / WORD_BITS)), 4),
        "scales": Packed((groups, out_features), scale_bytes),
        "g_idx": Packed((in_features,), 4),
    }


def awq_tensors(shape: tuple[int, ...], bits: int, group_size: int, *, scale_bytes: int = 2) -> dict[str, Packed]:
    """qweight, qzeros and scales of an AWQ checkpoint of version gemm: words run along out_features. bits: 4."""
    out_features, in_features = shape
    groups, words = group_count(in_features, group_size), ceil(out_features * bits / WORD_BITS)
    return {
        "qweight": Packed((in_features, words), 4),
        "qzeros": Packed((groups, words), 4),
        "scales": Packed((groups, out_features), scale_bytes),
    }


def int4pack_tensors(shape: tuple[int, ...], group_size: int) -> dict[str, Packed]:
    """What aten::_weight_int4pack_mm_for_cpu multiplies with: two weights a byte, 16-bit scale and offset a group."""
    out_features, in_features = shape
    return {
        "qweight": Packed((out_features, ceil(in_features / 2)), 1),
        "scales_and_zeros": Packed((group_count(in_features, group_size), out_features, 2), 2),
    }


def total_bytes(tensors: Mapping[str, Packed]) -> int:
    """Bytes of all tensors of a layer."""
    return sum(tensor.nbytes for tensor in tensors.values())


def gptq_bytes(shape: tuple[int, ...], bits: int, group_size: int, *, scale_bytes: int = 2) -> int:
    """Bytes of a layer as a GPTQ checkpoint stores it."""
    return total_bytes(gptq_tensors(shape, bits, group_size, scale_bytes=scale_bytes))


def awq_bytes(shape: tuple[int, ...], bits: int, group_size: int, *, scale_bytes: int = 2) -> int:
    """Bytes of a layer as an AWQ checkpoint of version gemm stores it."""
    return total_bytes(awq_tensors(shape, bits, group_size, scale_bytes=scale_bytes))


def int4pack_bytes(shape: tuple[int, ...], group_size: int) -> int:
    """Bytes of a layer in torch's int4 matmul on the CPU."""
    return total_bytes(int4pack_tensors(shape, group_size))


def packed_group(in_features: int, group_size: int) -> int:
    """A group size as the packed layout has it: libraries forget whether one group for all was meant, or its size."""
    return -1 if group_size == in_features else group_size


def packed_format(
    weight: WeightInfo, bits: int, group_size: int, *, sym: bool, ordered: bool = False
) -> PackedFormat | None:
    """The place of a GPTQ or AWQ layer in polyquant's packed layout, with its scales as the checkpoint stores them.

    sym: all zero points are in the middle of the range. ordered: columns belong to groups in an order of their own.
    None: of 2 and 3 bits, for which 4 would be wasted, and of reordered columns that have to be padded.
    """
    size = packed_group(weight.shape[1], group_size)
    layout = PackedFormat(
        kind="int8" if bits == 8 else "affine4", group_size=size, offsets="none" if sym else "zeros",
        scale_dtype=weight.parts.get("scales", "float16"),  # type: ignore[arg-type]  # `require_parts` refuses others
        ordered=ordered and size != -1,
    )  # fmt: skip
    whole = layout.padded(weight.shape)[1] == weight.shape[1]
    return layout if bits in (4, 8) and (whole or not layout.ordered) else None


def require_gptq(weight: WeightInfo, bits: int, group_size: int) -> None:
    """Raises ConfigError where the groups or the packed words of a GPTQ layer do not come out even."""
    out_features, in_features = weight.shape
    require_groups(weight, group_size)
    word = WORD_BITS if bits == 3 else WORD_BITS // bits  # weights that fill whole words
    if in_features % word or out_features % word:
        what = f"{bits}-bit words hold {word} weights, which does not divide {out_features} x {in_features}"
        raise unfit(weight, what)


def require_awq(weight: WeightInfo, bits: int, group_size: int) -> None:
    """Raises ConfigError where the groups or the packed words of an AWQ layer do not come out even."""
    out_features, word = weight.shape[0], WORD_BITS // bits
    require_groups(weight, group_size)
    if out_features % word:
        raise unfit(weight, f"words hold {word} weights, which does not divide out_features {out_features}")


def require_groups(weight: WeightInfo, group_size: int) -> None:
    """Raises ConfigError where in_features is no whole number of groups."""
    in_features = weight.shape[1]
    if group_size != -1 and in_features % group_size:
        raise unfit(
            weight, f"group_size {group_size} does not divide in_features {in_features}", ["another group_size"]
        )
