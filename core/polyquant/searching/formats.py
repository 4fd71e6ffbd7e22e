"""The formats of a search: which, and what each makes of the model, tensor by tensor. Nothing is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polyquant.errors import CheckpointConflict, ConfigError, UnsupportedOperation, did_you_mean
from polyquant.isolated import handles
from polyquant.loading.load import prepare
from polyquant.loading.options import LoadOptions
from polyquant.loading.settle import Settled, route_of
from polyquant.mixing import MixableOptions
from polyquant.models.model import Model
from polyquant.modules import matching_modules, module_of
from polyquant.options import BackendOptions, describe_options
from polyquant.packable import LIBRARY, PackableOptions
from polyquant.registry.backend import Backend
from polyquant.request import ModelSource
from polyquant.types import BackendInfo, LayerPlan, WeightInfo


class Planned(NamedTuple):
    """A model, settled and planned with some options."""

    source: ModelSource  # the dense checkpoint
    settled: Settled
    plans: list[LayerPlan]

    @property
    def stored_bytes(self) -> int:
        return sum(plan.stored_bytes for plan in self.plans)

    def by_module(self) -> Counter[str]:
        """Bytes of each module."""
        found: Counter[str] = Counter()
        for plan in self.plans:
            found[module_of(plan)] += plan.stored_bytes
        return found


class Formats:
    """A model in each of several formats of a backend.

    given: options of the backend that every format has; modules that its `layers` name are not searched.
    Raises ConfigError, CheckpointConflict and UnsupportedOperation for what cannot be searched.
    """

    def __init__(
        self, model: str | Path, revision: str | None, backend: Backend, given: Mapping[str, Any], how: LoadOptions,
        asked: Sequence[str],
    ) -> None:  # fmt: skip
        self.backend, self.given, self._how = backend, given, how
        library = {"kernel": LIBRARY} if issubclass(backend.info.options, PackableOptions) else {}
        asked_for = {name: given[name] for name in given if name in backend.info.options.load_time}
        self.load_options: dict[str, Any] = {**library, **asked_for}
        """What is chosen as the model is loaded: one kernel for every assignment, so that their bytes add up."""
        self._option = option_of(backend)
        config = _mixable(backend.config(given))  # raises for wrong options before any file is read
        self._options_type = type(config)
        names = _names(backend.info, self._option[0], asked)
        if how.adapter:
            raise ConfigError("a search is of the model alone: leave adapter out, and train or merge on what it finds")
        if wrong := [name for name in self._option if name in given]:
            raise ConfigError(f"a search chooses {', '.join(wrong)}: say what is tried with formats (--formats)")
        self._model = Model.find(
            model, revision=revision, allow_pickle=how.allow_pickle, trust_remote_code=how.trust_remote_code,
            progress=how.progress,
        )  # fmt: skip
        self.name, source = self._model.name, self._model.source
        self._path = model if revision is None else source.path / source.gguf_file
        self._route = route_of(self._model.source, backend)
        if self._route == "as stored":
            raise CheckpointConflict(f"{self.name} is quantized already; a search needs the dense model")
        settled = self._settled({})[1]
        fixed = {name for name, _ in _mixable(settled.options).layers}
        skipped = matching_modules(settled.weights, config.skip)
        kept = (*fixed, *skipped)
        self._vocabulary = [
            module_of(weight)
            for weight in settled.weights
            if _is_vocabulary(weight) and weight.role in config.mixes and module_of(weight) not in kept
        ]
        self.notes: list[str] = []
        self.uniform: dict[str, Planned] = {}
        for name in names:
            try:
                self.uniform[name] = self.planned(self.of_all(name))
            except ConfigError as error:
                if asked or not error.unfit:
                    raise
                self.notes.append(f"{name} is not tried: {error.unfit}")
        if not self.uniform:
            raise ConfigError(f"no format of {backend.name} fits {self.name}: {'; '.join(self.notes)}")
        plans = next(iter(self.uniform.values())).plans
        quantized = dict.fromkeys(module_of(plan) for plan in plans if plan.quantized)  # experts have two matrices
        self.searched: list[str] = [name for name in quantized if name not in fixed]
        if not self.searched:
            raise ConfigError(f"nothing of {self.name} is left to be searched: take skip and layers back")
        self._bytes = {name: planned.by_module() for name, planned in self.uniform.items()}
        self.usual = [name for name in self.searched if name not in self._vocabulary]

    @property
    def made_first(self) -> bool:
        """Whether the backend loads checkpoints only, so that one is made of each assignment that is loaded."""
        return self._route == "make first"

    @property
    def path(self) -> str | Path:
        """The model, as loads and `quantize` take it: of another revision than the usual one, its files."""
        return self._path

    @property
    def calibrated(self) -> bool:
        """Whether weights are rounded by calibration text."""
        return next(iter(self.uniform.values())).settled.options.rounding_method == "calibrated"

    def usual_format(self, chosen: str) -> Mapping[str, Any]:
        """The options that give linear layers a format where `layers` names none."""
        return self._options_type.of_format(chosen)

    def of_all(self, chosen: str) -> dict[str, Any]:
        """The options of one format for everything."""
        return {**self.usual_format(chosen), "layers": tuple((name, chosen) for name in self._vocabulary)}

    def options(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """All options: those that every format has, and `own`, whose layers come before those that were given."""
        layers = (*own.get("layers", ()), *_mixable(self.backend.config(self.given)).layers)
        return {**self.given, **own, **({"layers": layers} if layers else {})}

    def nbytes(self, chosen: str, modules: Sequence[str]) -> int:
        """Bytes of modules in a format."""
        return sum(self._bytes[chosen][module] for module in modules)

    @property
    def rest_bytes(self) -> int:
        """Bytes of all that is not searched."""
        found = next(iter(self._bytes.values()))
        return found.total() - sum(found[module] for module in self.searched)

    def planned(self, own: Mapping[str, Any]) -> Planned:
        """The model with `own` options."""
        source, settled = self._settled(own)
        return Planned(source, settled, self.backend.plan_layers(settled.weights, settled.options))

    def _settled(self, own: Mapping[str, Any]) -> tuple[ModelSource, Settled]:
        options = {**self.options(own), **self.load_options}
        config = self.backend.config(options)
        request, settled = prepare(self._model, self.backend, config, options, self._how, self._route)
        return request.source, settled


def option_of(backend: Backend) -> tuple[str, ...]:
    """The options that choose a format. Raises UnsupportedOperation where a model of this backend has one format."""
    options = backend.info.options
    if not issubclass(options, MixableOptions) or not options.format_options or not backend.can("plan_layers"):
        able = [info.name for info in handles.backends() if issubclass(info.options, MixableOptions)]
        mixing = ", ".join(able) or "not installed"
        raise UnsupportedOperation(f"{backend.name} gives all layers one format; backends that mix them are {mixing}")
    return options.format_options


def _names(info: BackendInfo, option: str, asked: Sequence[str]) -> list[str]:
    """The formats that are tried: those asked for, else those that presets name with nothing else."""
    known = next(found.values for found in describe_options(info.options) if found.name == "layers")
    for name in asked:
        if name not in known:
            allowed = ", ".join(map(str, known))
            hint = did_you_mean(name, map(str, known))
            raise ConfigError(f"no format {name!r} of {info.name}'s; there are {allowed}.{hint}")
    usual = [str(preset[option]) for preset in info.presets.values() if set(preset) == {option}]
    return list(dict.fromkeys(asked or usual))


def _is_vocabulary(weight: WeightInfo) -> bool:
    return weight.role in ("embedding", "head") and len(weight.shape) == 2 and not weight.tied_to


def _mixable(config: BackendOptions) -> MixableOptions:
    assert isinstance(config, MixableOptions)  # `option_of` has seen to it
    return config
