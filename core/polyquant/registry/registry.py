"""Finds backend plugins and calls their hooks. The only file that touches pluggy's manager or entry points.

Names are listed from metadata without importing anything, cards are read from the files that packages ship (see
`cards`); a plugin is imported when a hook of it is called, in a `try` of its own, checked whole (every required hook
there, none misspelt, the right arguments), and rolled back where a check fails, so that one broken plugin is one row
with its reason.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from time import perf_counter
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
from polyquant.registry import cards, hooks
from polyquant.registry.answers import ITEMS, cure_of_import, result_of, unmet_requirement, wrong_answer
from polyquant.registry.catalogue import hint
from polyquant.registry.observers import Call, Trace, calling
from polyquant.support.containing import output_to
from polyquant.types import BackendInfo

SLOW_SECONDS = 3.0  # of importing a plugin, which imports nothing heavy


class Registry:
    """The installed backends of this process."""

    def __init__(self, specification: type = hookspecs.QuantBackend) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(specification)
        self._specification = specification
        self._plugins: dict[str, object] = {}
        self._infos: dict[str, BackendInfo] = {}
        self._cards: dict[str, Mapping[str, cards.Card]] = {}  # package -> what its file says
        self._broken: dict[str, BrokenBackend] = {}
        self._complaints: dict[str, list[str]] = {}
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
        """The backend's card. Imports its plugin where no file has it. Raises UnknownBackend or BrokenBackend."""
        card = self._card(name)
        return card.info if card else self._imported(name)

    def package_cards(self, name: str) -> dict[str, cards.Card]:
        """Of `name` and the backends of its package: cards and optional hooks, by the plugins. Raises as `info`."""
        together = [other for other in self.names() if self.package(other) == self.package(name)]
        infos = {other: self._imported(other) for other in together}
        return {
            other: cards.Card(info, tuple(hook for hook in hookspecs.OPTIONAL if self.implements(other, hook)))
            for other, info in infos.items()
        }

    def package(self, name: str) -> str:
        """The top-level package of the plugin that provides `name`; imports nothing. Raises UnknownBackend."""
        self._require_known(name)
        return self._found[name][0].value.partition(":")[0].strip().partition(".")[0]

    def plugin(self, name: str) -> object:
        """The plugin object itself, for checks of its hooks' signatures. Raises as `info` does."""
        self._ensure(name)
        return self._plugins[name]

    def complaints(self, name: str) -> list[str]:
        """What a plugin did to others when it was imported: it printed, or took long. Imports nothing."""
        return self._complaints.get(name, [])

    def implements(self, name: str, hook: str) -> bool:
        """Whether the backend has this optional hook. Imports its plugin where no file says it."""
        if card := self._card(name):
            return hook in (*hookspecs.REQUIRED, *card.hooks)
        self._ensure(name)
        return any(impl.plugin is self._plugins[name] for impl in getattr(self._manager.hook, hook).get_hookimpls())

    def add_observer(self, observer: object) -> None:
        """Register an object whose `hookimpl(wrapper=True)` methods see every addressed call."""
        self._manager.register(observer)

    def remove_observer(self, observer: object) -> None:
        """Undo `add_observer`."""
        self._manager.unregister(observer)

    def observed(
        self, name: str, hook: str, answer: Callable[[Call], Any], *, elsewhere: bool = True, **arguments: Any
    ) -> Any:
        """What `answer` gives in place of the backend's own hook; observers see it as a call.

        elsewhere: whether another process answers. arguments: the hook's, for observers that ask for them.
        """
        call = Call(name, elsewhere=elsewhere)
        caller = self._manager.subset_hook_caller(hook, remove_plugins=list(self._plugins.values()))
        with calling(call):
            return caller.call_extra([lambda: answer(call)], arguments)

    def call(self, name: str, hook: str, **arguments: Any) -> Any:
        """Call one hook of one backend; the answer's type is checked.

        Raises UnsupportedOperation where an optional hook is absent, BrokenBackend for a wrong answer, and
        BackendFailed, with the cause chained, where the backend's library raised.
        """
        self.require(name, hook)
        self._ensure(name)
        others = [plugin for other, plugin in self._plugins.items() if other != name]
        caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
        try:
            with output_to(sys.stderr), calling(Call(name)):
                result = caller(**arguments)
        except (PolyquantError, MemoryError, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit too
            raise self.failure(name, hook, error) from error
        if isinstance(result, list) and hook == "backend_info":
            result = result[0] if result else None
        if wrong := wrong_answer(result, result_of(hook), ITEMS.get(hook)):
            broken = BrokenBackend(
                f"{self.origin(name)}: {hook} {wrong} ({self._place(name, hook)}): {hooks.CURES[hook]}"
            )
            broken.hook = hook
            raise broken
        return result

    def failure(self, name: str, hook: str, error: BaseException) -> BackendFailed:
        """What is raised for an `error` of a hook, or of the layers that it made: where it was, and who mends it."""
        at = self._raised_at(name, error) or self._place(name, hook)
        makers = f"mend it there, or tell the makers of {self.origin(name)}: {self._infos[name].docs}"
        cure = hooks.cure_of(error) or makers
        failure = BackendFailed(f"{name} failed in {hook}: {type(error).__name__}: {error} ({at}); {cure}")
        failure.hook = hook
        return failure

    def _place(self, name: str, hook: str) -> str:
        return hooks.defined_at(getattr(self._plugins[name], hook))

    def _raised_at(self, name: str, error: BaseException) -> str:
        return hooks.raised_at(error, self.package(name))

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

    def _card(self, name: str) -> cards.Card | None:
        """What the file of its package says of a backend whose plugin is not imported; None where there is none."""
        if name in self._infos or name in self._broken or len(self._found.get(name, ())) != 1:
            return None
        package = self.package(name)
        if package not in self._cards:
            self._cards[package] = cards.read(package, lambda each: self._imported(each).options)
        return self._cards[package].get(name)

    def _imported(self, name: str) -> BackendInfo:
        self._ensure(name)
        return self._infos[name]

    def _require_known(self, name: str) -> None:
        if name not in self._found:
            installed = ", ".join(self.names()) or "none (try: pip install polyquant-bitsandbytes)"
            other = hint(name, self._found) or did_you_mean(name, self._found)
            raise UnknownBackend(f"no backend {name!r}; installed: {installed}.{other}")

    def _ensure(self, name: str) -> None:
        if name in self._infos:
            return
        self._require_known(name)
        if name not in self._broken:
            try:
                with self._watching(name):
                    self._register(name)
                return
            except BrokenBackend as error:
                self._broken[name] = error
                plugin = self._plugins.pop(name, None)
                if plugin is not None and self._manager.is_registered(plugin):
                    self._manager.unregister(plugin)
        raise self._broken[name]

    @contextmanager
    def _watching(self, name: str) -> Iterator[None]:
        """Within the block, a plugin's prints are kept from standard output; that and slowness is told, with its name.

        It is told on standard error, once.
        """
        said, started = io.StringIO(), perf_counter()
        try:
            with output_to(said):
                yield
        finally:
            seconds, printed = perf_counter() - started, said.getvalue().strip()
            complaints = [f"printed while it was imported: {printed[:200]!r}"] if printed else []
            if seconds > SLOW_SECONDS:
                complaints.append(f"took {seconds:.1f} s to import, which every command waits for")
            self._complaints[name] = complaints
            for complaint in complaints:
                print(f"polyquant: {self.origin(name)} {complaint}", file=sys.stderr, flush=True)

    def _register(self, name: str) -> None:
        origin = self.origin(name)
        if len(self._found[name]) > 1:
            raise BackendConflict(f"backend {name!r} is claimed by {origin}; uninstall one of them")
        point = self._found[name][0]
        try:
            plugin = point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit too
            at = self._raised_at(name, error) or point.value
            raise BrokenBackend(
                f"{origin}: import failed with {type(error).__name__}: {error} ({at}): {cure_of_import(point, error)}"
                f"{self._requirement(name)}"
            ) from error
        try:
            marked = hooks.implementations(plugin, self._manager.parse_hookimpl_opts)
            wrong = list(hooks.misfits(plugin, marked, self._specification, hookspecs.REMOVED))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            at = self._raised_at(name, error) or point.value
            raise BrokenBackend(
                f"{origin}: its hooks cannot be read: {type(error).__name__}: {error} ({at}): mend it there"
                f"{self._requirement(name)}"
            ) from error
        if wrong:
            shown = "\n  - ".join(("", *wrong)) if len(wrong) > 1 else f" {wrong[0]}"
            raise BrokenBackend(f"{origin}: hooks do not fit the specification:{shown}{self._requirement(name)}")
        self._plugins[name] = plugin
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except Exception as error:
            raise BrokenBackend(f"{origin}: hooks do not fit the specification: {error}") from error
        info = self._checked_info(name, plugin, origin)
        if unmet := self._requirement(name):
            raise BrokenBackend(f"{origin}: it is made for another polyquant{unmet}")
        self._infos[name] = info

    def _requirement(self, name: str) -> str:
        return unmet_requirement(self._found[name][0].dist)

    def _checked_info(self, name: str, plugin: Any, origin: str) -> BackendInfo:
        at = hooks.defined_at(plugin.backend_info)
        try:
            info = plugin.backend_info()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit too
            at = self._raised_at(name, error) or at
            raise BrokenBackend(
                f"{origin}: backend_info failed with {type(error).__name__}: {error} ({at}): "
                f"{hooks.CURES['backend_info']}{self._requirement(name)}"
            ) from error
        if wrong := wrong_answer(info, BackendInfo, None):
            raise BrokenBackend(f"{origin}: backend_info {wrong} ({at}): {hooks.CURES['backend_info']}")
        if info.name != name:
            raise BrokenBackend(
                f"{origin}: entry point {name!r} answers with the card of {info.name!r} ({at}); give both one name"
            )
        return info  # type: ignore[no-any-return]  # checked above
