"""A plugin object whose hooks are functions of its package's files, which are imported when they are first called."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polyquant.contract import hookspecs
from polyquant.contract.markers import hookimpl
from polyquant.errors import BrokenBackend, did_you_mean
from polyquant.loaded import LoadedModel
from polyquant.options import BackendOptions, convert
from polyquant.request import LoadRequest
from polyquant.support.devices import device_problems
from polyquant.support.libraries import import_problems, library_problems
from polyquant.types import BackendInfo, LayerInfo, LayerPlan, Library, Problem, WeightInfo

FILES: Mapping[str, str] = {
    "load": "_load",
    "save": "_load",
    "describe_layers": "_layers",
    "prepare_for_training": "_layers",
    "plan_layers": "planning",
    "quantize": "_quantize",
    "pack": "_layers",
    "quantize_linear": "_layers",
    "unpack": "_layers",
    "write_unpacked": "_load",
}
"""hook -> the file of the package whose function of that name answers it."""


class PluginBackend:
    """The hooks of a backend, from its card and the files of its package.

    `load` is answered by `_load.load`, `plan_layers` by `planning.plan_layers`, and so on: see FILES. A subclass may
    write out any of them instead, as a method marked with @hookimpl.
    """

    def __init__(
        self,
        info: BackendInfo,
        hooks: Collection[str] = (),
        *,
        imports: Sequence[Library] = (),
        native_problems: bool = False,
        package: str = "",
    ) -> None:
        """info: the card. hooks: the optional ones that it has. package: of the files; left out, where the options lie.

        imports: libraries that the environment's check imports, to see that they work. native_problems: whether
        `_library.native_problems(device)` says what else is wrong, where nothing else is.
        Raises ValueError for a hook that there is not.
        """
        for hook in hooks:
            if hook not in FILES:
                raise ValueError(f"unknown hook {hook!r}; there are {', '.join(FILES)}.{did_you_mean(hook, FILES)}")
        self.info, self.imports, self.native_problems = info, tuple(imports), native_problems
        self.package = package or info.options.__module__.rpartition(".")[0]
        for hook, function in _forwarding(self._answer).items():
            if hook in (*hookspecs.REQUIRED, *hooks) and not hasattr(type(self), hook):
                function.forwards_to = f"{self.package}.{FILES[hook]}:{hook}"  # type: ignore[attr-defined]
                setattr(self, hook, hookimpl(function))

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return self.info

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = self.library_problems()
        problems += [] if problems else import_problems(self.imports)
        problems += device_problems(device, self.info.capabilities)
        if self.native_problems and not problems:
            problems += self._function("_library", "native_problems")(device)
        return problems

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> BackendOptions:
        return convert(self.info.options, options)

    # where messages send the author: to the card and the options, whose text these three are answered from
    backend_info.forwards_to = validate_environment.forwards_to = ".plugin"  # type: ignore[attr-defined]
    build_config.forwards_to = ".options"  # type: ignore[attr-defined]

    def library_problems(self) -> list[Problem]:
        """Libraries of the card that are missing or of another version."""
        return library_problems(self.info.libraries)

    def _answer(self, hook: str, *arguments: Any) -> Any:
        return self._function(FILES[hook], hook)(*arguments)

    def _function(self, file: str, name: str) -> Callable[..., Any]:
        module = f"{self.package}.{file}"
        function: Callable[..., Any] | None = getattr(import_module(module), name, None) if find_spec(module) else None
        if function is None:
            broken = BrokenBackend(
                f"{self.info.name}: {name} is to be answered by a function of that name in {self.package}/{file}.py, "
                "and there is none; write it"
            )
            broken.hook = name if name in FILES else "validate_environment"
            raise broken
        return function


def _forwarding(answer: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """hook -> a function with the hook's arguments, by which pluggy knows it."""

    def load(request: LoadRequest, config: BackendOptions) -> LoadedModel:
        return answer("load", request, config)  # type: ignore[no-any-return]

    def describe_layers(model: Any) -> list[LayerInfo]:
        return answer("describe_layers", model)  # type: ignore[no-any-return]

    def plan_layers(weights: Sequence[WeightInfo], config: BackendOptions) -> list[LayerPlan]:
        return answer("plan_layers", weights, config)  # type: ignore[no-any-return]

    def quantize(request: LoadRequest, config: BackendOptions, calibration: Sequence[str], out: Path) -> Path:
        return answer("quantize", request, config, calibration, out)  # type: ignore[no-any-return]

    def prepare_for_training(loaded: LoadedModel) -> Any:
        return answer("prepare_for_training", loaded)

    def save(loaded: LoadedModel, out: Path) -> Path:
        return answer("save", loaded, out)  # type: ignore[no-any-return]

    def pack(module: Any) -> Any:
        return answer("pack", module)

    def quantize_linear(linear: Any, config: BackendOptions) -> Any:
        return answer("quantize_linear", linear, config)

    def unpack(weight: Any, config: BackendOptions) -> dict[str, Any]:
        return answer("unpack", weight, config)  # type: ignore[no-any-return]

    def write_unpacked(loaded: LoadedModel, layers: Iterable[tuple[str, dict[str, Any]]], out: Path) -> Path:
        return answer("write_unpacked", loaded, layers, out)  # type: ignore[no-any-return]

    functions = (
        load, describe_layers, plan_layers, quantize, prepare_for_training, save, pack, quantize_linear,
        unpack, write_unpacked,
    )  # fmt: skip
    return {function.__name__: function for function in functions}
