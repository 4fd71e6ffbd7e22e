"""Which modules get adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from polyquant.errors import ConfigError, did_you_mean
from polyquant.modules import matches
from polyquant.support.peft import import_peft
from polyquant.types import LayerInfo


class Targets(NamedTuple):
    """Full names of the modules to adapt, and what to say about the choice."""

    names: list[str]
    notes: list[str]


def target_modules(layers: Sequence[LayerInfo], patterns: Sequence[str], model: Any = None) -> Targets:
    """The modules that `patterns` match, by default every quantized linear layer that PEFT puts adapters on.

    model: the base, whose architecture PEFT judges by. Raises ConfigError for a pattern that matches no linear layer or
    one that PEFT refuses, and where nothing is quantized and nothing is named.
    """
    linear = {layer.name.rpartition(".")[0]: layer for layer in layers if layer.role == "linear"}
    refusal = _refusal_of_peft(model)
    if not patterns:
        quantized = [name for name, layer in linear.items() if layer.quantized]
        chosen = [name for name in quantized if not refusal(name)]
        if not chosen:
            raise ConfigError("no linear layer is quantized: name the modules to adapt with targets (--targets)")
        left = sorted({name.rpartition(".")[2] for name in quantized if refusal(name)})
        notes = [f"{', '.join(left)} got no adapters: PEFT puts none there in a model of this kind"] if left else []
        return Targets(chosen, notes)
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in linear if matches(name, pattern)]
        if not hits:
            parts = sorted({part for name in linear for part in name.split(".") if not part.isdigit()})
            raise ConfigError(
                f"target {pattern!r} matches no linear layer; name parts here are {', '.join(parts[:24])}."
                f"{did_you_mean(pattern, parts)}"
            )
        if refused := next((name for name in hits if refusal(name)), ""):
            able = sorted({name.rpartition(".")[2] for name in linear if not refusal(name)})
            raise ConfigError(
                f"target {pattern!r} matches {refused}, which PEFT refuses: {refusal(refused)}; "
                f"name others with targets (--targets): {', '.join(able)}"
            )
        found.update(dict.fromkeys(hits))
    return Targets(list(found), [])


def _refusal_of_peft(model: Any) -> Callable[[str], str]:
    """name -> why PEFT puts no LoRA adapter on the module of `model`; empty where it does.

    Kernels of Mamba's read the weights of some modules past any adapter. PEFT says so from 0.16 on.
    """
    peft = import_peft()
    check = getattr(peft.tuners.tuners_utils, "_check_lora_target_modules_mamba", None)
    config = peft.LoraConfig()

    def refusal(name: str) -> str:
        try:
            if check is not None:
                check(config, model, name.rpartition(".")[2])
        except ValueError as error:
            return str(error)
        return ""

    return refusal
