"""A model that is being planned: its outline, and its skeletons, each built once for all candidates."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from polyquant.errors import ModelError
from polyquant.memory.context import Context
from polyquant.memory.planned import DTYPE_BYTES
from polyquant.models.outline import Outline, outline
from polyquant.options import Dtype
from polyquant.planning.process import bare_bytes
from polyquant.types import WeightInfo


class PlannedModel:
    """What all plans of a model share.

    Raises ModelError where the model cannot be found, its headers lie, or transformers cannot build it.
    """

    def __init__(
        self, model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, as_gguf: bool = False
    ) -> None:
        self.outline: Outline = outline(model, revision=revision, as_gguf=as_gguf)
        self.name = self.outline.source.name
        self._trust = trust_remote_code
        self._weights: dict[Dtype, list[WeightInfo]] = {}
        self._contexts: dict[tuple[int, int], Context | None] = {}
        self.weights("bfloat16")  # imports the model's code, as every load does, before the process is weighed
        self.process_bytes = bare_bytes()

    def skeleton(self, dtype: Dtype) -> Any:
        """Its modules on the meta device; a new one at each call."""
        from polyquant.models import hf

        return hf.skeleton(self.outline.source, dtype, trust_remote_code=self._trust)

    def weights(self, dtype: Dtype) -> list[WeightInfo]:
        """Its tensors, dense ones in `dtype`. Raises ModelError where they contradict the checkpoint's headers."""
        from polyquant.memory.weights import list_weights

        if dtype not in self._weights:
            listed = list_weights(self.skeleton(dtype))
            if not self._weights:
                self._check_shapes(listed)
            self._weights[dtype] = listed
        return self._weights[dtype]

    def context(self, dtype: Dtype, tokens: int, batch: int) -> Context | None:
        """What a context takes; None where the model's forward pass cannot be followed without weights.

        Followed in bfloat16, the one dtype in which experts' matmuls have a shape-only form, and scaled.
        """
        from polyquant.memory.context import context_memory

        if (tokens, batch) not in self._contexts:
            self._contexts[tokens, batch] = context_memory(self.skeleton("bfloat16"), tokens, batch)
        found, times = self._contexts[tokens, batch], DTYPE_BYTES[dtype] // 2
        return found and Context(found.kv_cache_bytes * times, found.activation_bytes * times)

    def dense_file_bytes(self, weights: list[WeightInfo]) -> int:
        """Size of the dense checkpoint: its files, or what they would be by the config's dtype."""
        if self.outline.checkpoint_bytes and not self.outline.source.gguf_file:
            return self.outline.checkpoint_bytes
        each = 4 if self.outline.source.gguf_file else DTYPE_BYTES.get(self.outline.dtype, 2)  # GGUFs are made float32
        return sum(each * prod(weight.shape) for weight in weights if not weight.tied_to and weight.role != "buffer")

    def _check_shapes(self, weights: list[WeightInfo]) -> None:
        if self.outline.source.stored_quantization or self.outline.source.gguf_file:
            return
        for weight in weights:
            found = self.outline.tensors.get(weight.name)
            if found is not None and found.shape != weight.shape and weight.role != "buffer":
                raise ModelError(
                    f"{self.name}: {weight.name} has the shape {found.shape} in its weight files, and "
                    f"{weight.shape} by its config.json; one of them belongs to another model"
                )
