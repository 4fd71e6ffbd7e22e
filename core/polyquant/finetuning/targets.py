"""Which modules get adapters."""

from __future__ import annotations

from collections.abc import Sequence

from polyquant.errors import ConfigError, did_you_mean
from polyquant.options import matches
from polyquant.types import LayerInfo


def target_modules(layers: Sequence[LayerInfo], patterns: Sequence[str]) -> list[str]:
    """Full names of the modules to adapt: those that `patterns` match, by default every quantized linear layer.

    Raises ConfigError for a pattern that matches no linear layer, and where nothing is quantized and nothing is named.
    """
    linear = {layer.name.rpartition(".")[0]: layer for layer in layers if layer.role == "linear"}
    if not patterns:
        chosen = [name for name, layer in linear.items() if layer.quantized]
        if not chosen:
            raise ConfigError("no linear layer is quantized: name the modules to adapt with targets (--targets)")
        return chosen
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in linear if matches(name, pattern)]
        if not hits:
            parts = sorted({part for name in linear for part in name.split(".") if not part.isdigit()})
            raise ConfigError(
                f"target {pattern!r} matches no linear layer; name parts here are {', '.join(parts[:24])}."
                f"{did_you_mean(pattern, parts)}"
            )
        found.update(dict.fromkeys(hits))
    return list(found)
