"""A model before it is loaded: its outline, and its weights by shape, each read and built once for all who ask."""

from __future__ import annotations

from math import prod
from typing import Any

from polyquant.errors import ModelError
from polyquant.models.outline import Outline
from polyquant.options import Dtype
from polyquant.types import DTYPE_BYTES, WeightInfo


class Model:
    """What is known of a model without its weights."""

    def __init__(self, outline: Outline, *, trust_remote_code: bool = False) -> None:
        self.outline = outline
        self.name = outline.source.name
        self._trust = trust_remote_code
        self._weights: dict[Dtype, tuple[WeightInfo, ...]] = {}

    def skeleton(self, dtype: Dtype) -> Any:
        """Its modules on the meta device, in `dtype`; a new one at each call, for whoever changes it."""
        from polyquant.models import hf

        return hf.skeleton(self.outline.source, dtype, trust_remote_code=self._trust)

    def weights(self, dtype: Dtype) -> tuple[WeightInfo, ...]:
        """Its tensors, dense ones in `dtype`; listed once for each dtype.

        Raises ModelError where transformers cannot build it, or its shapes contradict the checkpoint's headers.
        """
        from polyquant.models.weights import list_weights

        if dtype not in self._weights:
            listed = tuple(list_weights(self.skeleton(dtype)))
            if not self._weights:
                self._check_shapes(listed)
            self._weights[dtype] = listed
        return self._weights[dtype]

    def dense_file_bytes(self, weights: tuple[WeightInfo, ...]) -> int:
        """Size of the dense checkpoint: its files, or what they would be by the config's dtype."""
        if self.outline.checkpoint_bytes and not self.outline.source.gguf_file:
            return self.outline.checkpoint_bytes
        each = 4 if self.outline.source.gguf_file else DTYPE_BYTES.get(self.outline.dtype, 2)  # GGUFs are made float32
        return sum(each * prod(weight.shape) for weight in weights if not weight.tied_to and weight.role != "buffer")

    def _check_shapes(self, weights: tuple[WeightInfo, ...]) -> None:
        if self.outline.source.stored_quantization or self.outline.source.gguf_file:
            return
        for weight in weights:
            found = self.outline.tensors.get(weight.name)
            if found is not None and found.shape != weight.shape and weight.role != "buffer":
                raise ModelError(
                    f"{self.name}: {weight.name} has the shape {found.shape} in its weight files, and "
                    f"{weight.shape} by its config.json; one of them belongs to another model"
                )
