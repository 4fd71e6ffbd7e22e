"""Packed layouts of GPTQ and AWQ: the tensors of one linear layer, in checkpoints and in torch's int4 matmul.

Shapes of a layer are (out_features, in_features), as torch.nn.Linear has them. A group size of -1 is one group for all
of in_features; a last group may be shorter than the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import ceil, inf, prod
from typing import Any, NamedTuple

from polyquant.errors import Misfit
from polyquant.plugin.planning import unfit
from polyquant.types import HeldWeight, PackedFormat, WeightInfo

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


def integers_held(weights: Sequence[HeldWeight], bits: Collection[int], sizes: Collection[int]) -> dict[str, Any]:
    """bits, group_size, sym and desc_act of a GPTQ or AWQ checkpoint that holds integers as they are.

    bits, sizes: that the format has; a size of -1 is all columns. Groups that are larger or differ are held in the
    largest that divides them all. Raises Misfit.
    """
    found = {weight.bits if weight.kind == "integers" else 0 for weight in weights}
    if len(found) > 1 or not found <= set(bits):
        names = sorted({f"{weight.kind} of {weight.bits} bits" for weight in weights})
        held = " or ".join(map(str, sorted(bits)))
        raise Misfit("bits", f"its codes are {' and '.join(names)}, and integers of {held} bits alone are held")
    if any(weight.zero_points == "none" for weight in weights):
        raise Misfit("minima", "its minima are no whole multiples of its scales, and zero points are integers")
    return {
        "bits": found.pop(), "group_size": size_held(weights, sizes),
        "sym": all(weight.zero_points == "middle" for weight in weights),
        "desc_act": any(weight.ordered for weight in weights),
    }  # fmt: skip


def size_held(weights: Sequence[HeldWeight], sizes: Collection[int]) -> int:
    """The largest of a format's group sizes into which the groups of all weights divide. Raises Misfit for none."""
    for size in sorted(sizes, key=lambda size: inf if size == -1 else size, reverse=True):
        if all(_divides(size, weight) for weight in weights):
            return size
    own = " and ".join(str(size) for size in sorted({weight.group_size for weight in weights}))
    held = ", ".join(map(str, sorted(sizes)))
    raise Misfit("group size", f"its groups are of {own} columns, and those held of {held} do not divide them")


def _divides(size: int, weight: HeldWeight) -> bool:
    """Whether groups of `size` hold those of a weight: with act-order only the same do."""
    columns = weight.shape[1]
    wanted = columns if size == -1 else size
    same = wanted == weight.group_size
    return same or (not weight.ordered and wanted < weight.group_size and not weight.group_size % wanted
                    and not columns % wanted)  # fmt: skip
