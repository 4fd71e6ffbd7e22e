"""A model before it is loaded: found, its headers read, and its weights by shape, each once for all who ask."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Self

from msgspec.structs import replace

from polyquant.models import marks
from polyquant.models.outline import Outline, outline_of
from polyquant.models.resolve import dense_of, resolve
from polyquant.modules import module_of
from polyquant.options import Dtype
from polyquant.request import KvCache, ModelSource
from polyquant.types import DTYPE_BYTES, WeightInfo

FLOATS = ("float64", "float32", "bfloat16", "float16")


class Model:
    """What is known of a model without its weights."""

    def __init__(self, outline: Outline, *, trust_remote_code: bool = False) -> None:
        self.outline = outline
        self.source: ModelSource = outline.source
        self.name = outline.source.name
        self.trusts_remote_code = trust_remote_code
        self._weights: dict[Dtype, tuple[WeightInfo, ...]] = {}
        self.renamed: dict[str, str] = {}  # what a packed checkpoint calls otherwise; known with the weights

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
        return self if source is self.source else Model(outline_of(source), trust_remote_code=self.trusts_remote_code)

    def skeleton(self, dtype: Dtype) -> Any:
        """Its modules on the meta device, in `dtype`; a new one at each call, for whoever changes it."""
        from polyquant.models import hf

        return hf.skeleton(
            self.source, dtype, trust_remote_code=self.trusts_remote_code, stored=self.outline.tensors or None
        )

    @cached_property
    def config(self) -> Any:
        """Its config, as transformers has it without what a quantized checkpoint adds."""
        return self.skeleton("bfloat16").config

    def require_attention(self, attention: str) -> None:
        """Raises ConfigError where the model cannot have the attention implementation of that name here."""
        from polyquant.models import hf

        hf.require_attention(self.source, attention, trust_remote_code=self.trusts_remote_code)

    def require_kv_cache(self, kv_cache: KvCache) -> None:
        """Raises ConfigError where the model cannot keep its keys and values as codes here."""
        from polyquant.models.kv_cache import refuse

        refuse(self.name, kv_cache, self._cache_obstacle)

    @cached_property
    def _cache_obstacle(self) -> str:
        from polyquant.models.kv_cache import obstacle

        return obstacle(self.skeleton("bfloat16"))

    def weights(self, dtype: Dtype) -> tuple[WeightInfo, ...]:
        """Its tensors, dense ones in `dtype`; listed once for each dtype.

        Raises ModelError where transformers cannot build it, or the checkpoint's headers name other tensors.
        """
        from polyquant.models.weights import list_weights

        if dtype not in self._weights:
            skeleton = self.skeleton(dtype)
            if not self._weights:
                self._require_fit(skeleton)
            self._weights[dtype] = tuple(list_weights(skeleton))
        return self._weights[dtype]

    def dense_file_bytes(self, weights: tuple[WeightInfo, ...]) -> int:
        """Size of the dense checkpoint: its files, or what they would be by the config's dtype."""
        if self.outline.checkpoint_bytes and not self.source.gguf_file:
            return self.outline.checkpoint_bytes
        each = 4 if self.source.gguf_file else DTYPE_BYTES.get(self.outline.dtype, 2)  # GGUFs are made float32
        return sum(each * prod(weight.shape) for weight in weights if not weight.tied_to and weight.role != "buffer")

    def is_read_in_turn(self) -> bool:
        """Whether a load can quantize the dense checkpoint tensor by tensor as it is read; else it is loaded whole."""
        from polyquant.models import conversions

        return conversions.read_in_turn(self.source, trust_remote_code=self.trusts_remote_code)

    def _require_fit(self, skeleton: Any) -> None:
        """Raises ModelError where the checkpoint's headers lack a tensor of the model, or hold others."""
        if self.source.gguf_file or not self.outline.tensors:
            return
        import torch

        from polyquant.models.fit import Misfit, misfit, renamed, require_fit

        if stored := self.source.stored_quantization:
            by_marks = marks.renamed(str(stored.get("quant_method")), self.outline.tensors)
            self.renamed = renamed(skeleton, self.outline.tensors) | by_marks
            require_fit(self.name, Misfit(self._modules_without_tensors(skeleton), ()))
            return
        tensors = {
            name: torch.empty(found.shape, dtype=getattr(torch, found.dtype, torch.uint8), device="meta")
            for name, found in self.outline.tensors.items()
        }
        require_fit(self.name, misfit(skeleton, tensors))

    def _modules_without_tensors(self, skeleton: Any) -> list[str]:
        """Parameters of modules of which a packed checkpoint holds no part, nor a part of a module inside.

        None where it names its modules otherwise, as some do that transformers renames while it loads them.
        """
        from polyquant.models import versions

        tied = versions.tied_tensors(skeleton)
        named = [name for name, _ in skeleton.named_parameters() if name not in {*tied, *tied.values()}]
        without = [name for name in named if name.rpartition(".")[0] not in self._inside]
        return without if len(without) < len(named) / 2 else []

    def holds_dense(self, weight: WeightInfo) -> bool:
        """Whether the checkpoint holds a weight as it is in the model, with nothing but a bias beside it."""
        found = self.outline.tensors.get(weight.name)
        same = found is not None and found.shape == weight.shape and found.dtype in FLOATS
        return same and self._inside[module_of(weight)].keys() <= {"weight", "bias"}

    def holds_part(self, weight: WeightInfo) -> bool:
        """Whether the checkpoint holds anything of the module of a weight."""
        return module_of(weight) in self._inside

    def with_parts(self, weights: tuple[WeightInfo, ...]) -> tuple[WeightInfo, ...]:
        """`weights`, each matrix that the checkpoint holds packed with the tensors that it holds of it.

        Experts with those of all experts of their layer, where any is no plain float.
        """
        return tuple(replace(weight, parts=self._parts(weight)) for weight in weights)

    def _parts(self, weight: WeightInfo) -> Mapping[str, str]:
        inside = self._inside.get(module_of(weight), {})
        if weight.role == "experts":
            return inside if not set(inside.values()) <= set(FLOATS) else {}
        return inside if weight.role in ("linear", "head", "embedding") and not self.holds_dense(weight) else {}

    @cached_property
    def _inside(self) -> Mapping[str, Mapping[str, str]]:
        """Name of a module that the checkpoint holds something of -> dtypes of its tensors by their names inside it."""
        inside: dict[str, dict[str, str]] = {}
        for name, tensor in self.outline.tensors.items():
            parts = self.renamed.get(name, name).split(".")
            for end in range(1, len(parts)):
                inside.setdefault(".".join(parts[:end]), {})[".".join(parts[end:])] = tensor.dtype
        return inside
