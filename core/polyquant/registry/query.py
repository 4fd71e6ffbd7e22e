"""Capability queries over backend cards, with the nearest misses and their reasons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import overload

import msgspec

from polyquant.errors import ConfigError, PolyquantError, did_you_mean
from polyquant.options import describe_options
from polyquant.support.shown import Look, Looked
from polyquant.types import BackendInfo, Capabilities, Record

PLURAL = {"scheme": "schemes", "device": "devices", "quant_method": "loads_prequantized"}
OPTION = "option"  # in a query: a name, not a capability


class Miss(Record, frozen=True):
    """A backend that does not satisfy a query, or cannot be used at all."""

    name: str
    reasons: tuple[str, ...]
    broken: bool = False


class Selection(Looked, Sequence[BackendInfo]):
    """The backends that satisfy a query; `misses` are the others, nearest first, each with its reasons."""

    def __init__(self, found: Iterable[BackendInfo], misses: Iterable[Miss]) -> None:
        self._found = tuple(found)
        self.misses = tuple(sorted(misses, key=lambda miss: (miss.broken, len(miss.reasons), miss.name)))

    @overload
    def __getitem__(self, index: int) -> BackendInfo: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[BackendInfo]: ...
    def __getitem__(self, index: int | slice) -> BackendInfo | Sequence[BackendInfo]:
        return self._found[index]

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[BackendInfo]:
        return iter(self._found)

    @property
    def names(self) -> list[str]:
        """The names of the backends that satisfy the query."""
        return [info.name for info in self._found]

    def __repr__(self) -> str:
        if self._found:
            return f"Selection({', '.join(self.names)})"
        misses = "; ".join(f"{miss.name}: {', '.join(miss.reasons)}" for miss in self.misses)
        return f"Selection(none; nearest: {misses or 'no backend is installed'})"

    def look(self) -> Look:
        if not self._found:
            return Look(repr(self))
        rows = [(info.name, info.summary, ", ".join(info.presets), ", ".join(info.capabilities.loads_prequantized))
                for info in self._found]  # fmt: skip
        broken = [f"{miss.name}: {'; '.join(miss.reasons)}" for miss in self.misses if miss.broken]
        return Look(f"{len(rows)} backends", ("backend", "", "presets", "reads"), rows, broken)


def select(cards: Iterable[BackendInfo], query: Mapping[str, object], broken: Iterable[Miss] = ()) -> Selection:
    """Filter `cards` by capabilities.

    query: names of Capabilities fields, or `scheme`, `device`, `quant_method`; a value that a collection must
    contain (bits=4), or True or False; `option`: the name of an option that a backend must have, which imports its
    plugin. Raises ConfigError for a name that is no capability, or no option of any backend.
    """
    query = dict(query)
    option = query.pop(OPTION, None)
    fields = [field.name for field in msgspec.structs.fields(Capabilities)]
    names = {key: PLURAL.get(key, key) for key in query}
    for key, field in names.items():
        if field not in fields:
            known = [*fields, *PLURAL, OPTION]
            raise ConfigError(f"unknown capability {key!r}; there are {', '.join(known)}.{did_you_mean(key, known)}")
    found, misses = [], list(broken)
    options: set[str] = set()  # of all
    for card in cards:
        wanted = ((names[key], value) for key, value in query.items() if value is not None)
        reasons = [reason for field, value in wanted if (reason := _miss(card.capabilities, field, value))]
        if option is not None:
            try:
                own = [each.name for each in describe_options(card.options)]
            except PolyquantError as error:  # its plugin is imported for the first time
                misses.append(Miss(name=card.name, reasons=(str(error),), broken=True))
                continue
            options.update(own)
            reasons += [] if option in own else [f"options are {', '.join(own)}, not {option}"]
        if reasons:
            misses.append(Miss(name=card.name, reasons=tuple(reasons)))
        else:
            found.append(card)
    if option is not None and option not in options and options:
        raise ConfigError(
            f"no backend has an option {option!r}; see one's: polyquant run --backend NAME --help."
            f"{did_you_mean(str(option), options)}"
        )
    return Selection(found, misses)


def _miss(capabilities: Capabilities, field: str, wanted: object) -> str:
    """Why `field` does not satisfy `wanted`; empty where it does."""
    has = getattr(capabilities, field)
    if isinstance(has, bool):
        return "" if has == wanted else f"{field} is {'yes' if has else 'no'}"
    if isinstance(has, str):
        return "" if has == wanted else f"{field} is {has}"
    if field == "devices":
        has = tuple(device.type for device in has)
        wanted = str(wanted).partition(":")[0]
    shown = ", ".join(map(_plain, has)) or "none"
    return "" if wanted in has else f"{field} are {shown}, not {_plain(wanted)}"


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
