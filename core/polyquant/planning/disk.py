"""What `offload="disk"` comes to in a plan: what stays in memory, what is read for each token, and how fast that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from polyquant.memory.on_disk import Split, experts_per_token, split
from polyquant.support.cache import cache_folder
from polyquant.support.disk import read_rate
from polyquant.support.sizes import size
from polyquant.types import LayerPlan


class DiskPlan(NamedTuple):
    """Which blocks are read, and the disk's rate: None where none are, or it could not be measured."""

    split: Split
    room: int  # bytes of memory for weights
    bytes_per_second: float | None

    @property
    def told(self) -> str:
        """In a sentence, with the option of a load that comes to the same."""
        if not self.split.on_disk:
            return self.split.told
        if self.bytes_per_second is None:
            speed = "how fast the disk is could not be measured, since the cache cannot be written to"
        else:
            tokens = self.bytes_per_second / self.split.read_bytes
            speed = f"the disk of the cache read {size(self.bytes_per_second)}/s, which is {tokens:.2g} tokens/s"
        if self.split.resident_bytes > self.room:
            return f"{self.split.told}; {speed}. That does not fit either: take embeddings='8bit', or fewer bits"
        option = f"max_memory={{'cpu': {self.room}}} (--max-memory cpu={self.room})"
        return f"{self.split.told}; {speed}. A load does so with {option}"


def disk_plan(plans: Sequence[LayerPlan], room: int, config: Mapping[str, Any]) -> DiskPlan:
    """plans: of all tensors; room: bytes of memory for weights; config: the model's config.json."""
    found = split(plans, room, experts_per_token(config))
    return DiskPlan(found, room, read_rate(cache_folder()) if found.on_disk else None)
