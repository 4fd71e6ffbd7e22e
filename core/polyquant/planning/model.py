"""A model that is being planned: what is known of it, what a context takes, and what the process weighs without it."""

from __future__ import annotations

from pathlib import Path

from polyquant.memory.context import Context
from polyquant.models.model import Model
from polyquant.models.outline import outline
from polyquant.options import Dtype
from polyquant.planning.process import bare_bytes
from polyquant.request import KvCache
from polyquant.types import DTYPE_BYTES


class PlannedModel(Model):
    """What all plans of a model share.

    Raises ModelError where the model cannot be found, its headers lie, or transformers cannot build it.
    """

    def __init__(self, model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
        super().__init__(outline(model, revision=revision), trust_remote_code=trust_remote_code)
        self._contexts: dict[tuple[int, int, KvCache], Context | None] = {}
        self.weights("bfloat16")  # imports the model's code, as every load does, before the process is weighed
        self.process_bytes = bare_bytes()

    def context(self, dtype: Dtype, tokens: int, batch: int, kv_cache: KvCache = "keep") -> Context | None:
        """What a context takes; None where the model's forward pass cannot be followed without weights.

        Followed in bfloat16, the one dtype in which experts' matmuls have a shape-only form, and scaled.
        """
        from polyquant.memory.context import context_memory

        asked, times = (tokens, batch, kv_cache), DTYPE_BYTES[dtype] // 2
        if asked not in self._contexts:
            self._contexts[asked] = context_memory(self.skeleton("bfloat16"), *asked)
        if (found := self._contexts[asked]) is None:
            return None
        wide = found.kv_cache_bytes - found.code_bytes
        return Context(found.code_bytes + wide * times, found.activation_bytes * times, found.code_bytes)
