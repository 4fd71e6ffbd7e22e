"""Experts that a checkpoint holds one by one, a name for each matrix; transformers fuses them. Imports torch.

Names as Mixtral (w1, w2, w3), Qwen-MoE and DeepSeek (gate_proj, up_proj, down_proj) have them. What a backend quantizes
of an expert, such as its weight and scales, are parts of one layer here: the first matrix's rows, then the second's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyquant.errors import ModelError
from polyquant.loaded import LoadedModel
from polyquant.packed_weights.experts import LinearExperts
from polyquant.packed_weights.frozen import PackedLinear

PLACES: Mapping[str, int] = {"gate_proj": 0, "up_proj": 1, "down_proj": 0, "w1": 0, "w3": 1, "w2": 0}
"""Name of an expert's matrix -> where its rows are among those that are fused with it."""
_STORED = re.compile(r".*\.experts\.(?P<expert>\d+)\.(?P<matrix>\w+)\.(?P<part>\w+)$")


class StoredPart(NamedTuple):
    """A tensor of an expert, as a checkpoint has it."""

    stack: str  # the model's tensor of all experts, such as model.layers.0.mlp.experts.gate_up_proj
    expert: int
    place: int
    part: str  # such as weight


def stored_part(name: str, names: Mapping[str, str]) -> StoredPart | None:
    """What a checkpoint's tensor is of an expert; None of another. names: as a request has them."""
    found = _STORED.match(name)
    if found is None or found["matrix"] not in PLACES or name not in names:
        return None
    whole = names[name].removesuffix(f".{found['part']}")
    return StoredPart(whole, int(found["expert"]), PLACES[found["matrix"]], found["part"])


def part_of(names: Mapping[str, str]) -> Callable[[str], tuple[str, str]]:
    """The argument `part` of `checkpoints.read_layers`: of an expert's the stack, and `expert.place.part` in it."""

    def part(name: str) -> tuple[str, str]:
        if found := stored_part(name, names):
            return found.stack, f"{found.expert}.{found.place}.{found.part}"
        home, _, short = names.get(name, name).rpartition(".")
        return home, short

    return part


def stack(
    dense: Tensor, tensors: Mapping[str, Tensor], make: Callable[[Any, dict[str, Tensor]], PackedLinear]
) -> LinearExperts:
    """The experts of a layer, of what `read_layers` gives of them.

    dense: (experts, out_features, in_features), on the meta device. make: (a linear layer that says the sizes, its
    tensors, whose rows are those of all its matrices; of what is one number for a matrix as many) -> the packed layer.
    Raises ModelError where an expert or a part
    of it is missing, and where `make` does.
    """
    found: dict[int, dict[str, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        expert, place, part = name.split(".")
        found[int(expert)][part][int(place)] = tensor
    count, rows, columns = dense.shape
    if missing := sorted(set(range(count)) ^ set(found)):
        raise ModelError(f"its experts should be 0 to {count - 1}, and expert {missing[0]} is missing or too many")
    places = sorted({place for parts in found.values() for each in parts.values() for place in each})
    linear = torch.nn.Linear(columns, rows, bias=False, device="meta")

    def layers() -> Iterable[PackedLinear]:
        for expert in range(count):
            try:
                whole = {part: _joined(part, each, places) for part, each in found.pop(expert).items()}
                yield make(linear, whole)
            except ModelError as error:
                raise ModelError(f"expert {expert}: {error}") from error

    return LinearExperts.of(layers(), count)


def as_stored(loaded: LoadedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the experts of its stacks one by one, under the names that the model was loaded from."""
    names = loaded.request.names if loaded.request else {}
    stored = {name: part for name in names if (part := stored_part(name, names))}
    count: dict[tuple[str, str], int] = defaultdict(int)
    for part in stored.values():
        count[part.stack, part.part] = max(count[part.stack, part.part], part.place + 1)
    apart, taken = dict[str, Tensor](), set[str]()
    for name, part in stored.items():
        if (whole := tensors.get(f"{part.stack}.{part.part}")) is not None:
            taken.add(f"{part.stack}.{part.part}")
            rows = torch.atleast_1d(whole[part.expert]).chunk(count[part.stack, part.part])
            own = rows[part.place].clone()
            apart[name] = own.reshape(()) if whole.dim() == 1 else own  # one number for a matrix
    return {name: tensor for name, tensor in tensors.items() if name not in taken} | apart


def _joined(part: str, matrices: Mapping[int, Tensor], places: list[int]) -> Tensor:
    """Raises ModelError where the part of a matrix is missing, or their columns differ."""
    if sorted(matrices) != places:
        raise ModelError(f"{part} of one of its matrices is missing")
    try:
        each = [matrices[place] if matrices[place].dim() else matrices[place].view(1) for place in places]
        return torch.cat(each) if len(places) > 1 else matrices[places[0]]
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(each.shape)) for each in matrices.values())
        raise ModelError(f"{part} of its matrices do not fit each other: {shapes}") from error
