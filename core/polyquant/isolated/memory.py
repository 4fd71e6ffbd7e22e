"""Memory for large answers that is used again: the system gives fresh pages more slowly than a pipe fills them."""

from __future__ import annotations

import weakref
from typing import Any

KEPT = 2  # blocks: a caller often holds the last answer until it has the next
LEAST_BYTES, MOST_BYTES = 2**20, 2**28  # of a block that is kept


class Blocks:
    """The blocks that were used last, each lent to one tensor at a time."""

    def __init__(self) -> None:
        self._blocks: list[tuple[Any, weakref.ref[Any]]] = []

    def take(self, nbytes: int) -> Any:
        """A torch tensor of `nbytes` bytes, unset. Its block is free again once no tensor shares its memory."""
        import numpy as np
        import torch

        if not LEAST_BYTES <= nbytes <= MOST_BYTES:
            return torch.empty(nbytes, dtype=torch.uint8)
        fitting = (entry for entry in self._blocks if entry[1]() is None and entry[0].nbytes >= nbytes)
        found = next(fitting, None)
        block = found[0] if found else np.empty(nbytes, np.uint8)
        part = block[:nbytes]  # it lives as long as the memory of the tensor
        self._blocks = [(block, weakref.ref(part)), *(entry for entry in self._blocks if entry is not found)][:KEPT]
        return torch.from_numpy(part)
