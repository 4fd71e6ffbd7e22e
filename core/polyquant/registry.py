"""Finds backend plugins and calls their hooks. The only file that touches pluggy's manager or entry points.

Names are listed from metadata without importing anything; a plugin is imported when it is first used, in a `try`
of its own, checked whole (every required hook there, none misspelt, the right arguments), and rolled back where a
check fails, so that one broken plugin is one row with its reason.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

from polyquant import hookspecs
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
from polyquant.markers import ENTRY_POINT_GROUP, PROJECT
from polyquant.options import BackendOptions
from polyquant.types import BackendInfo

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


class Registry:
    """The installed backends of this process."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs.QuantBackend)
        self._plugins: dict[str, object] = {}
        self._infos: dict[str, BackendInfo] = {}
        self._broken: dict[str, BrokenBackend] = {}
        self._found: dict[str, list[EntryPoint]] = {}
        disabled = {name.strip() for name in os.environ.get("POLYQUANT_DISABLE", "").split(",")}
        for point in entry_points(group=ENTRY_POINT_GROUP):
            if point.name not in disabled and point not in self._found.get(point.name, []):
                self._found.setdefault(point.name, []).append(point)

    def names(self) -> list[str]:
        """Every installed backend, broken ones too; imports nothing."""
        return sorted(self._found)

    def origin(self, name: str) -> str:
        """The distributions that provide `name`, such as 'polyquant-hqq 0.1.0'."""
        return " and ".join(f"{p.dist.name} {p.dist.version}" if p.dist else p.value for p in self._found[name])

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

    def call(self, name: str, hook: str, **arguments: Any) -> Any:
        """Call one hook of one backend; the answer's type is checked.

        Raises UnsupportedOperation where an optional hook is absent, BrokenBackend for a wrong answer, and
        BackendFailed, with the cause chained, where the backend's library raised.
        """
        self.require(name, hook)
        others = [plugin for other, plugin in self._plugins.items() if other != name]
        caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
        try:
            result = caller(**arguments)
        except (PolyquantError, MemoryError):
            raise
        except Exception as error:
            raise BackendFailed(f"{name} failed in {hook}: {type(error).__name__}: {error}") from error
        if isinstance(result, list) and hook == "backend_info":
            result = result[0] if result else None
        if not isinstance(result, RESULTS[hook]) or result is None:
            raise BrokenBackend(
                f"{self.origin(name)}: {hook} must answer with {RESULTS[hook].__name__}, "
                f"it answered with {type(result).__name__}; update or remove the plugin"
            )
        return result

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
            raise UnknownBackend(f"no backend {name!r}; installed: {installed}.{did_you_mean(name, self._found)}")
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
        try:
            plugin = self._found[name][0].load()
        except Exception as error:
            raise BrokenBackend(f"{origin}: import failed with {type(error).__name__}: {error}") from error
        self._plugins[name] = plugin
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except Exception as error:
            known = hookspecs.REQUIRED + hookspecs.OPTIONAL
            unknown = str(error).partition("unknown hook '")[2].partition("'")[0]
            hint = did_you_mean(unknown, known) if unknown else ""
            raise BrokenBackend(f"{origin}: hooks do not fit the specification: {error}.{hint}") from error
        missing = [hook for hook in hookspecs.REQUIRED if not self._has(plugin, hook)]
        if missing:
            raise BrokenBackend(f"{origin}: lacks the required hook(s) {', '.join(missing)}")
        self._infos[name] = self._checked_info(name, plugin, origin)

    def _has(self, plugin: object, hook: str) -> bool:
        return any(impl.plugin is plugin for impl in getattr(self._manager.hook, hook).get_hookimpls())

    def _checked_info(self, name: str, plugin: Any, origin: str) -> BackendInfo:
        try:
            info = plugin.backend_info()
        except Exception as error:
            raise BrokenBackend(f"{origin}: backend_info failed with {type(error).__name__}: {error}") from error
        if not isinstance(info, BackendInfo):
            raise BrokenBackend(
                f"{origin}: backend_info must answer with BackendInfo, it answered with {type(info).__name__}"
            )
        if info.name != name:
            raise BrokenBackend(
                f"{origin}: entry point {name!r} answers with the card of {info.name!r}; give both one name"
            )
        return info
