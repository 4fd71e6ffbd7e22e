"""What stays in memory of a model whose packed blocks are partly read from the disk for each token.

Embedding, head, norms and whatever is dense stay, and of the blocks, from the first on, those that fit. The others are
read one after the other: one is multiplied with while the next is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from polyquant.support.sizes import size
from polyquant.types import LayerPlan, Record

AT_ONCE = 2  # blocks that are read
SHARE = 0.8  # of the memory that is free, for weights; the rest is for keys, values and activations
_BLOCK = re.compile(r"(.+?\.\d+)\.")


class Split(Record, frozen=True):
    """Which blocks are read for each token."""

    resident_bytes: int  # what is in memory at once: what stays, and `AT_ONCE` of the blocks that are read
    on_disk: tuple[str, ...] = ()  # such as model.layers.7, in order; none where everything fits
    disk_bytes: int = 0  # of their packed weights
    read_bytes: int = 0  # of these for each token: of a mixture's experts those that it is routed to

    @property
    def told(self) -> str:
        """In a sentence."""
        if not self.on_disk:
            return (
                f"everything fits, {size(self.resident_bytes)} of weights: nothing is read from the disk for each token"
            )
        return (
            f"{len(self.on_disk)} blocks, from {self.on_disk[0]} on, stay on disk: {size(self.read_bytes)} are read "
            f"for each token, and weights take {size(self.resident_bytes)} of memory"
        )


def block_of(name: str) -> str:
    """The block that a tensor is in, such as model.layers.7; empty where it is in none."""
    found = _BLOCK.match(name)
    return found[1] if found else ""


def split(plans: Sequence[LayerPlan], room: int, experts_per_token: int = 0) -> Split:
    """Which blocks are on disk where weights have `room` bytes of memory; `resident_bytes` is more where none do."""
    blocks, routed = dict[str, int](), dict[str, int]()
    for plan in plans:
        name = block_of(plan.name)
        if name and plan.packed is not None and plan.role not in ("embedding", "head"):
            blocks[name] = blocks.get(name, 0) + plan.stored_bytes
            share = min(1.0, experts_per_token / plan.shape[0]) if plan.role == "experts" and experts_per_token else 1
            routed[name] = routed.get(name, 0) + int(plan.stored_bytes * share)
    total = sum(plan.stored_bytes for plan in plans)
    if total <= room or not blocks:
        return Split(resident_bytes=total)
    names, resident = list(blocks), total - sum(blocks.values()) + AT_ONCE * max(blocks.values())
    first = 0
    while first < len(names) - AT_ONCE and resident + blocks[names[first]] <= room:
        resident += blocks[names[first]]
        first += 1
    read = names[first:]
    return Split(
        resident_bytes=resident, on_disk=tuple(read), disk_bytes=sum(blocks[name] for name in read),
        read_bytes=sum(routed[name] for name in read),
    )  # fmt: skip


def experts_per_token(config: Mapping[str, Any]) -> int:
    """Experts that a token is routed to, as a model's config has them; 0 where it has none."""
    text = config.get("text_config") or config
    found = next((text[name] for name in ("num_experts_per_tok", "top_k_experts", "moe_topk") if text.get(name)), 0)
    return found if isinstance(found, int) else 0
