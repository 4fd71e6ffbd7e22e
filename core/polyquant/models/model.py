"""A model before it is loaded: found, its headers read, and its weights by shape, each once for all who ask."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, Self

from polyquant.errors import ModelError
from polyquant.models.outline import Outline, outline_of
from polyquant.models.resolve import dense_of, resolve
from polyquant.options import Dtype
from polyquant.request import ModelSource
from polyquant.types import DTYPE_BYTES, WeightInfo


class Model:
    """What is known of a model without its weights."""

    def __init__(self, outline: Outline, *, trust_remote_code: bool = False) -> None:
        self.outline = outline
        self.source: ModelSource = outline.source
        self.name = outline.source.name
        self._trust = trust_remote_code
        self._weights: dict[Dtype, tuple[WeightInfo, ...]] = {}

    @classmethod
    def find(
        cls, model: str | Path, *, revision: str | None = None, allow_pickle: bool = False,
        trust_remote_code: bool = False, progress: bool = False,
    ) -> Self:  # fmt: skip
        """The model with its weight files, of the hub too, which are fetched. Raises ModelError; see `resolve`."""
        source = resolve(model, revision=revision, allow_pickle=allow_pickle, progress=progress)
        return cls(outline_of(source), trust_remote_code=trust_remote_code)

    def as_transformers_reads(self, *, dense: bool = False, progress: bool = False) -> Model:
        """The model in files that the installed transformers reads; dense: made of a GGUF first, on first use."""
        from polyquant.models import versions

        source = dense_of(self.source, progress=progress) if dense else self.source
        source = versions.readable(source)
        return self if source is self.source else Model(outline_of(source), trust_remote_code=self._trust)

    def skeleton(self, dtype: Dtype) -> Any:
        """Its modules on the meta device, in `dtype`; a new one at each call, for whoever changes it."""
        from polyquant.models import hf

        return hf.skeleton(self.source, dtype, trust_remote_code=self._trust)

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
        if self.outline.checkpoint_bytes and not self.source.gguf_file:
            return self.outline.checkpoint_bytes
        each = 4 if self.source.gguf_file else DTYPE_BYTES.get(self.outline.dtype, 2)  # GGUFs are made float32
        return sum(each * prod(weight.shape) for weight in weights if not weight.tied_to and weight.role != "buffer")

    def _check_shapes(self, weights: tuple[WeightInfo, ...]) -> None:
        if self.source.stored_quantization or self.source.gguf_file:
            return
        for weight in weights:
            found = self.outline.tensors.get(weight.name)
            if found is not None and found.shape != weight.shape and weight.role != "buffer":
                raise ModelError(
                    f"{self.name}: {weight.name} has the shape {found.shape} in its weight files, and "
                    f"{weight.shape} by its config.json; one of them belongs to another model"
                )
