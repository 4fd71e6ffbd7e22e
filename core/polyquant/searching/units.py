"""What gets one format, and the options that come to an assignment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from polyquant.modules import kind_of, matches

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))
"""Last parts of the names of layers that read the same input: what one of them loses, its siblings lose alike."""


class Unit(NamedTuple):
    """Modules that get one format."""

    modules: tuple[str, ...]  # full names, in the order of the model

    @property
    def name(self) -> str:
        return ", ".join(self.modules)


def units_of(modules: Iterable[str], *, grouped: bool) -> list[Unit]:
    """The units that modules come to. grouped: siblings that read the same input are one."""
    found: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        parent, _, own = module.rpartition(".")
        kind = next((siblings[0] for siblings in SAME_INPUT if own in siblings), own) if grouped else own
        found.setdefault((parent, kind), []).append(module)
    return [Unit(tuple(each)) for each in found.values()]


def as_options(
    formats: Mapping[str, str], usual: Iterable[str], of_format: Callable[[str], Mapping[str, Any]]
) -> dict[str, Any]:
    """The options that give each module its format, in few words.

    formats: full module name -> format. usual: those of them that have the format of the options `of_format` where
    nothing is said.
    First one pattern for all layers of a kind whose usual format is another, then each layer that differs from these.
    """
    plain = set(usual)
    base = Counter(formats[name] for name in plain or formats).most_common(1)[0][0]
    kinds: dict[str, list[str]] = {}
    for name in formats:
        kinds.setdefault(kind_of(name), []).append(name)
    layers: list[tuple[str, str]] = []
    for kind, names in kinds.items():
        counts = Counter(formats[name] for name in names)
        most = max(counts, key=lambda name: (counts[name], name == base))
        if most != base or not plain.issuperset(names):
            layers.append((kind, most))
    said = dict.fromkeys(formats, base)
    for pattern, chosen in layers:
        said |= {name: chosen for name in formats if matches(name, pattern)}
    return {
        **of_format(base),
        "layers": (*layers, *((name, formats[name]) for name in formats if formats[name] != said[name])),
    }
