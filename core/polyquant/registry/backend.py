"""The `Backend` handle: one backend by name, with its hooks as typed methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from polyquant.errors import BackendFailed
from polyquant.memory.experts import with_experts
from polyquant.memory.packed import packed_plans
from polyquant.options import BackendOptions
from polyquant.packable import is_packed, packs_any
from polyquant.registry.hooks import last_own, package_of, raised_at
from polyquant.registry.observers import Recorder
from polyquant.registry.registry import Registry
from polyquant.registry.written import resolved
from polyquant.support.containing import Late, within
from polyquant.support.files import atomic_folder
from polyquant.support.libraries import refuse_problems
from polyquant.types import BackendInfo, Capabilities, LayerInfo, LayerPlan, Problem, WeightInfo

if TYPE_CHECKING:
    from polyquant.loaded import LoadedModel
    from polyquant.loading.settle import Settled
    from polyquant.request import LoadRequest

Answer = TypeVar("Answer")


class Backend:
    """An installed backend. Raises UnknownBackend or BrokenBackend when made."""

    answer_seconds = 60.0  # for validate_environment, which imports libraries

    def __init__(self, name: str, registry: Registry) -> None:
        self._registry = registry
        self.info: BackendInfo = registry.info(name)
        self.name = name
        self.origin = registry.origin(name)

    def __repr__(self) -> str:
        return f"Backend({self.name!r}, from {self.origin})"

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        return self.info.capabilities

    @property
    def plugin(self) -> object:
        """The plugin object, to look at; hooks are called through the methods here."""
        return self._registry.plugin(self.name)

    def can(self, hook: str) -> bool:
        """Whether it implements an optional hook: plan_layers, quantize, prepare_for_training, save."""
        return self._registry.implements(self.name, hook)

    def config(self, options: Mapping[str, object]) -> BackendOptions:
        """Checked options, the words of a query (`bits`, `scheme`) as the backend's own. Raises ConfigError."""
        return self._call("build_config", options=resolved(self.info, options))

    def problems(self, device: str = "cpu") -> list[Problem]:
        """Everything that stops it on this machine and device; empty where it can run."""
        return self._call("validate_environment", device=device)

    def problems_in_time(self, device: str = "cpu", seconds: float | None = None) -> list[Problem]:
        """`problems`, of a backend that may never answer.

        seconds: how long it may take; None: `answer_seconds`. Raises BackendFailed after them, with where it is.
        """
        seconds = self.answer_seconds if seconds is None else seconds
        package = package_of(self.plugin)  # imported here, and not by what may be left to itself
        try:
            return within(seconds, lambda: self.problems(device))
        except Late as late:
            at = last_own(late.lines, package) or "in a library"
            failure = BackendFailed(
                f"{self.name} has not answered validate_environment in {seconds:g} s ({at}); mend it there, or tell "
                f"the makers of {self.origin}"
            )
            failure.hook = "validate_environment"
            raise failure from late

    def require(self, device: str) -> None:
        """Raises EnvironmentProblem with every problem and its fix."""
        refuse_problems(self.problems(device), f"{self.name} cannot run on {device} here")

    def load(self, request: LoadRequest, settled: Settled) -> LoadedModel:
        """Load what is settled; time and peak memory are recorded in the result."""
        return self._completed(lambda: self._call("load", request=request, config=settled.options), request, settled)

    def take(self, restore: Callable[[], LoadedModel], request: LoadRequest, settled: Settled) -> LoadedModel:
        """What `restore` gives in place of the backend's own `load`: observers see it as that, and it is recorded."""
        arguments = {"request": request, "config": settled.options}

        def load() -> LoadedModel:
            taken: LoadedModel = self._registry.observed(
                self.name, "load", lambda call: restore(), elsewhere=False, **arguments
            )
            return taken

        return self._completed(load, request, settled)

    def _completed(self, load: Callable[[], LoadedModel], request: LoadRequest, settled: Settled) -> LoadedModel:
        loaded, recorder = self._recorded(load)
        loaded._backend, loaded.request, loaded.settled = self, request, settled
        loaded.records += recorder.records
        return loaded

    def own_fault(self, error: BaseException) -> BackendFailed | None:
        """What to raise for an error of a forward pass that is a slip in the backend's own code; None for any other."""
        slip = isinstance(error, (AttributeError, NameError, ImportError))
        own = slip and raised_at(error, package_of(self.plugin))
        return self._registry.failure(self.name, "load", error) if own else None

    def describe_layers(self, model: Any) -> list[LayerInfo]:
        """Every parameter and buffer of a loaded model."""
        return self._call("describe_layers", model=model)

    def plan_layers(self, weights: Sequence[WeightInfo], config: BackendOptions) -> list[LayerPlan]:
        """Predicted bytes of each tensor. Raises UnsupportedOperation where the backend does not plan."""

        def plan(some: Sequence[WeightInfo]) -> list[LayerPlan]:
            plans: list[LayerPlan] = self._call("plan_layers", weights=some, config=config)
            return plans

        plans = plan(weights)
        return with_experts(packed_plans(plans, weights, config), weights, config, plan) if packs_any(config) else plans

    def quantize_linear(self, linear: Any, config: BackendOptions) -> Any:
        """A plain linear layer as `load` quantizes it. Raises UnsupportedOperation where there is no such hook."""
        self._require_hook("quantize_linear")
        return self._call("quantize_linear", linear=linear, config=config)

    def pack(self, module: Any) -> Any:
        """The weight of a quantized module, as a `PackedWeight`."""
        return self._call("pack", module=module)

    def unpack(self, weight: Any, config: BackendOptions) -> dict[str, Any]:
        """The tensors of a linear layer, of a `WeightCodes`, under the format's names. Raises Misfit."""
        return self._call("unpack", weight=weight, config=config)

    def write_unpacked(self, loaded: LoadedModel, layers: Iterable[tuple[str, dict[str, Any]]], out: Path) -> Path:
        """Write converted layers as the format has them, into an empty folder."""
        return self._call("write_unpacked", loaded=loaded, layers=layers, out=out)

    def save(
        self, loaded: LoadedModel, out: Path, *, overwrite: bool = False, accept: Callable[[Path], None] | None = None
    ) -> Path:
        """Write a checkpoint, all or nothing.

        accept: called with what was written before it takes its place; what it raises leaves `out` as it was.
        Raises UnsupportedOperation before any work where the backend cannot, SaveError where writing fails.
        """
        self._require_hook("save")
        with atomic_folder(out, overwrite=overwrite, keeps=loaded.files) as partial:
            self.write(loaded, partial)
            if accept is not None:
                accept(partial)
        return out

    def write(self, loaded: LoadedModel, out: Path) -> None:
        """Write a checkpoint into a folder that is there. Raises SaveError."""
        own = self._as_its_own(loaded)
        known = len(own.notes)
        _, recorder = self._recorded(lambda: self._call("save", loaded=own, out=out))
        loaded.records += recorder.records
        if own is not loaded:
            loaded.notes += own.notes[known:]

    def quantize(
        self,
        request: LoadRequest,
        config: BackendOptions,
        calibration: Sequence[str],
        out: Path,
        *,
        overwrite: bool = False,
        accept: Callable[[Path], None] | None = None,
    ) -> Path:
        """Quantize with calibration texts into `out`, all or nothing.

        accept: called with what was written before it takes its place; what it raises leaves `out` as it was.
        """
        self._require_hook("quantize")
        with atomic_folder(out, overwrite=overwrite, keeps=request.source.files) as partial:
            self._call("quantize", request=request, config=config, calibration=calibration, out=partial)
            if accept is not None:
                accept(partial)
        return out

    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        """The model, ready for PEFT adapters; what PEFT cannot do with its packed layers is refused from here on."""
        self._require_hook("prepare_for_training")
        if find_spec("peft") is not None:
            from polyquant.plugin import adapters

            adapters.guard()
        if not is_packed(loaded.config):
            return self._call("prepare_for_training", loaded=loaded)
        from polyquant.plugin.layers import frozen_for_adapters
        from polyquant.registry import repacked

        if repacked.left_with_library(loaded.model, self):  # only the plugin knows how those train
            self._call("prepare_for_training", loaded=loaded)
        return frozen_for_adapters(loaded.model)

    def _as_its_own(self, loaded: LoadedModel) -> LoadedModel:
        """The model as the backend's library has it."""
        if not packs_any(loaded.config):
            return loaded
        from polyquant.registry import unpacked

        return unpacked.as_its_own(loaded, self)

    def _require_hook(self, hook: str) -> None:
        self._registry.require(self.name, hook)

    def _call(self, hook: str, **arguments: Any) -> Any:
        return self._registry.call(self.name, hook, **arguments)

    def _recorded(self, call: Callable[[], Answer]) -> tuple[Answer, Recorder]:
        """What a call of a hook answers, and its records."""
        recorder = Recorder(self.name)
        self._registry.add_observer(recorder)
        try:
            return call(), recorder
        finally:
            self._registry.remove_observer(recorder)
