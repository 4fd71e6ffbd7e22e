"""Names of modules, and the patterns that users write for them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from polyquant.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from polyquant.types import LayerInfo, LayerPlan, WeightInfo


def module_of(weight: WeightInfo | LayerPlan | LayerInfo) -> str:
    """The name of the module that owns a tensor."""
    return weight.name.rpartition(".")[0]


def kind_of(module: str) -> str:
    """The pattern of a module and its like in all layers: model.layers.*.mlp.up_proj."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def matching_modules(weights: Sequence[WeightInfo], patterns: tuple[str, ...], option: str = "skip") -> list[str]:
    """Names of the matrix-bearing modules that any of `patterns`, the value of an option, matches.

    A pattern is a run of name parts, anywhere in the name: 'layers.0', 'down_proj', 'layers.*.mlp', 'lm_head'.
    Raises ConfigError for a pattern that matches nothing.
    """
    names = [
        module_of(weight)
        for weight in weights
        if weight.role in ("linear", "experts", "head", "embedding", "tower", "custom", "other")
    ]
    matched: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in names if matches(name, pattern)]
        if not hits:
            parts = sorted({part for name in names for part in name.split(".")})
            raise ConfigError(
                f"{option} pattern {pattern!r} matches no module; name parts here are {', '.join(parts[:24])}."
                f"{did_you_mean(pattern, parts)}"
            )
        matched.update(dict.fromkeys(hits))
    return list(matched)


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern`, with its *, is a run of parts of `name`."""
    parts = name.split(".")
    runs = (parts[start:end] for start in range(len(parts)) for end in range(start + 1, len(parts) + 1))
    return any(fnmatchcase(".".join(run), pattern) for run in runs)
