"""Finds backend plugins and calls their hooks. The only file that touches pluggy's manager or entry points.

Names are listed from metadata without importing anything; a plugin is imported when it is first used, in a `try`
of its own, checked whole (every required hook there, none misspelt, the right arguments), and rolled back where a
check fails, so that one broken plugin is one row with its reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any

import pluggy

from polyquant.contract import hookspecs
from polyquant.contract.markers import ENTRY_POINT_GROUP, PROJECT
from polyquant.errors import (
    BackendConflict,
    BackendFailed,
    BrokenBackend,
    PolyquantError,
    UnknownBackend,
    UnsupportedOperation,
    did_you_mean,
)
from polyquant.loaded import LoadedModel
from polyquant.options import BackendOptions
from polyquant.registry import hooks
from polyquant.registry.catalogue import hint
from polyquant.registry.observers import Call, Trace, calling
from polyquant.types import BackendInfo, LayerInfo, LayerPlan, Problem

RESULTS: Mapping[str, type] = {
    "backend_info": BackendInfo,
    "validate_environment": list,
    "build_config": BackendOptions,
    "load": LoadedModel,
    "describe_layers": list,
    "plan_layers": list,
    "quantize": Path,
    "prepare_for_training": object,
    "save": Path,
}
ITEMS: Mapping[str, type] = {
    "validate_environment": Problem,
    "describe_layers": LayerInfo,
    "plan_layers": LayerPlan,
}


class Registry:
    """The installed backends of this process."""

    def __init__(self, specification: type = hookspecs.QuantBackend) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(specification)
        self._specification = specification
        self._plugins: dict[str, object] = {}
        self._infos: dict[str, BackendInfo] = {}
        self._broken: dict[str, BrokenBackend] = {}
        self._found: dict[str, list[EntryPoint]] = {}
        disabled = {name.strip() for name in os.environ.get("POLYQUANT_DISABLE", "").split(",")}
        for point in entry_points(group=ENTRY_POINT_GROUP):
            if point.name not in disabled and point not in self._found.get(point.name, []):
                self._found.setdefault(point.name, []).append(point)
        if os.environ.get("POLYQUANT_TRACE", "0") not in ("", "0"):
            self.add_observer(Trace())

    def names(self) -> list[str]:
        """Every installed backend, broken ones too; imports nothing."""
        return sorted(self._found)

    def origin(self, name: str) -> str:
        """The distributions that provide `name`, such as 'polyquant-hqq 0.1.0'."""
        return " and ".join(f"{p.dist.name} {p.dist.version}" if p.dist else p.value for p in self._found[name])

    def distribution(self, name: str) -> str:
        """The distribution that provides `name`; its name, empty where it has no metadata."""
        found = self._found[name][0].dist
        return found.name if found else ""

    def info(self, name: str) -> BackendInfo:
        """The backend's card. Imports its plugin. Raises UnknownBackend or BrokenBackend."""
        self._ensure(name)
        return self._infos[name]

    def plugin(self, name: str) -> object:
        """The plugin object itself, for checks of its hooks' signatures. Raises as `info` does."""
        self._ensure(name)
        return self._plugins[name]

    def implements(self, name: str, hook: str) -> bool:
        """Whether the backend has this optional hook."""
        self._ensure(name)
        return any(impl.plugin is self._plugins[name] for impl in getattr(self._manager.hook, hook).get_hookimpls())

    def add_observer(self, observer: object) -> None:
        """Register an object whose `hookimpl(wrapper=True)` methods see every addressed call."""
        self._manager.register(observer)

    def remove_observer(self, observer: object) -> None:
        """Undo `add_observer`."""
        self._manager.unregister(observer)

    def observed(self, name: str, hook: str, answer: Callable[[Call], Any], **arguments: Any) -> Any:
        """What `answer` gives in place of the backend's own hook, in another process; observers see it as a call.

        arguments: the hook's, for observers that ask for them.
        """
        call = Call(name, elsewhere=True)
        caller = self._manager.subset_hook_caller(hook, remove_plugins=list(self._plugins.values()))
        with calling(call):
            return caller.call_extra([lambda: answer(call)], arguments)

    def call(self, name: str, hook: str, **arguments: Any) -> Any:
        """Call one hook of one backend; the answer's type is checked.

        Raises UnsupportedOperation where an optional hook is absent, BrokenBackend for a wrong answer, and
        BackendFailed, with the cause chained, where the backend's library raised.
        """
        self.require(name, hook)
        others = [plugin for other, plugin in self._plugins.items() if other != name]
        caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
        try:
            with calling(Call(name)):
                result = caller(**arguments)
        except (PolyquantError, MemoryError):
            raise
        except Exception as error:
            at = self._raised_at(name, error) or self._place(name, hook)
            failure = BackendFailed(
                f"{name} failed in {hook}: {type(error).__name__}: {error} ({at}); "
                f"{hooks.cure_of(error) or self._makers(name)}"
            )
            failure.hook = hook
            raise failure from error
        if isinstance(result, list) and hook == "backend_info":
            result = result[0] if result else None
        if wrong := _wrong(hook, result):
            broken = BrokenBackend(
                f"{self.origin(name)}: {hook} {wrong} ({self._place(name, hook)}): {hooks.CURES[hook]}"
            )
            broken.hook = hook
            raise broken
        return result

    def _makers(self, name: str) -> str:
        return f"mend it there, or tell the makers of {self.origin(name)}: {self._infos[name].docs}"

    def _place(self, name: str, hook: str) -> str:
        return hooks.defined_at(getattr(self._plugins[name], hook))

    def _raised_at(self, name: str, error: BaseException) -> str:
        return hooks.raised_at(error, self._found[name][0].module)

    def require(self, name: str, hook: str) -> None:
        """Raises UnsupportedOperation, with the backends that can, where `name` lacks an optional hook."""
        if not self.implements(name, hook):
            offered = ", ".join(other for other in self.names() if self._can(other, hook)) or "none"
            raise UnsupportedOperation(f"{name} does not implement {hook}; installed backends that do: {offered}")

    def _can(self, name: str, hook: str) -> bool:
        try:
            return self.implements(name, hook)
        except BrokenBackend:
            return False

    def _ensure(self, name: str) -> None:
        if name in self._infos:
            return
        if name not in self._found:
            installed = ", ".join(self.names()) or "none (try: pip install polyquant-bitsandbytes)"
            other = hint(name, self._found) or did_you_mean(name, self._found)
            raise UnknownBackend(f"no backend {name!r}; installed: {installed}.{other}")
        if name not in self._broken:
            try:
                self._register(name)
                return
            except BrokenBackend as error:
                self._broken[name] = error
                plugin = self._plugins.pop(name, None)
                if plugin is not None and self._manager.is_registered(plugin):
                    self._manager.unregister(plugin)
        raise self._broken[name]

    def _register(self, name: str) -> None:
        origin = self.origin(name)
        if len(self._found[name]) > 1:
            raise BackendConflict(f"backend {name!r} is claimed by {origin}; uninstall one of them")
        point = self._found[name][0]
        try:
            plugin = point.load()
        except Exception as error:
            at = self._raised_at(name, error) or point.module
            raise BrokenBackend(
                f"{origin}: import failed with {type(error).__name__}: {error} ({at}): {_cure_of_import(point, error)}"
                f"{self._requirement(name)}"
            ) from error
        marked = hooks.implementations(plugin, self._manager.parse_hookimpl_opts)
        if wrong := list(hooks.misfits(plugin, marked, self._specification, hookspecs.REMOVED)):
            shown = "\n  - ".join(("", *wrong)) if len(wrong) > 1 else f" {wrong[0]}"
            raise BrokenBackend(f"{origin}: hooks do not fit the specification:{shown}{self._requirement(name)}")
        self._plugins[name] = plugin
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except Exception as error:
            raise BrokenBackend(f"{origin}: hooks do not fit the specification: {error}") from error
        self._infos[name] = self._checked_info(name, plugin, origin)

    def _requirement(self, name: str) -> str:
        """What to do where the plugin's own metadata asks for another polyquant than this one; empty where it fits."""
        from packaging.requirements import Requirement

        ours = version("polyquant")
        distribution = self._found[name][0].dist
        for requirement in map(Requirement, distribution.requires or () if distribution else ()):
            if requirement.name == "polyquant" and not requirement.specifier.contains(ours, True):
                return f". It requires {requirement}, and polyquant {ours} is installed: pip install '{requirement}'"
        return ""

    def _checked_info(self, name: str, plugin: Any, origin: str) -> BackendInfo:
        at = hooks.defined_at(plugin.backend_info)
        try:
            info = plugin.backend_info()
        except Exception as error:
            at = self._raised_at(name, error) or at
            raise BrokenBackend(
                f"{origin}: backend_info failed with {type(error).__name__}: {error} ({at}): "
                f"{hooks.CURES['backend_info']}{self._requirement(name)}"
            ) from error
        if wrong := _wrong("backend_info", info):
            raise BrokenBackend(f"{origin}: backend_info {wrong} ({at}): {hooks.CURES['backend_info']}")
        if info.name != name:
            raise BrokenBackend(
                f"{origin}: entry point {name!r} answers with the card of {info.name!r} ({at}); give both one name"
            )
        return info  # type: ignore[no-any-return]  # checked above


def _wrong(hook: str, result: object) -> str:
    """What is wrong with a hook's answer, in words; empty where it has the right type."""
    wanted, item = RESULTS[hook], ITEMS.get(hook)
    if result is None:
        return f"must answer with {wanted.__name__}, it answered with NoneType (does it return?)"
    if not isinstance(result, wanted):
        return f"must answer with {wanted.__name__}, it answered with {type(result).__name__}"
    strange = [each for each in result if not isinstance(each, item)] if item and isinstance(result, list) else []
    if strange and item:
        return f"must answer with a list of {item.__name__}, {type(strange[0]).__name__} is in it"
    return ""


def _cure_of_import(point: EntryPoint, error: Exception) -> str:
    own = point.module.partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and error.name:
        if error.name.partition(".")[0] == own:
            return f"the entry point names {point.value}; write that module, or mend the entry point in pyproject.toml"
        return (
            f"install {error.name}; a library that only the hooks need is imported inside them, so that listing works "
            "without it"
        )
    if isinstance(error, AttributeError) and point.attr and str(error).endswith(f"has no attribute {point.attr!r}"):
        return f"the entry point names {point.value}; write {point.attr} = YourBackend() at the end of that module"
    return "mend it there"
