"""What `embeddings` and `head` come to where they may stay dense: 16 bits beside packed weights, or as they are.

With activations in float32 a dense embedding, and above all the output head, is read in 32 bits for every token, and
most checkpoints hold it in 16. Measured on SmolLM2-135M in NF4, 2 threads: 68 tokens a second so, 128 in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from msgspec.structs import replace

from polyquant.errors import ConfigError
from polyquant.memory.packed import HALVES, OPTIONS, is_asked_before, place_of
from polyquant.options import BackendOptions
from polyquant.packable import AUTO, HALF, KEEP, is_packed
from polyquant.types import LayerPlan, WeightInfo

PLAIN = {"embeddings": ("Embedding", "Gemma3TextScaledWordEmbedding"), "head": ("Linear",)}
"""Classes of modules that do no more than look up rows, or multiply."""


class Planning(Protocol):
    """What the choice needs of a backend's handle."""

    def plan_layers(self, weights: Sequence[WeightInfo], config: BackendOptions) -> list[LayerPlan]: ...


def settled(
    config: BackendOptions, weights: Sequence[WeightInfo], stored: Mapping[str, str], otherwise: str, backend: Planning
) -> tuple[BackendOptions, tuple[WeightInfo, ...], list[str]]:
    """The options, with 16 bits where it comes to these; the weights in the dtypes that follow; notes on what rounds.

    stored: name of a tensor -> its dtype in the checkpoint; otherwise: of one that is not found there.
    Raises ConfigError where 16 bits are asked for what is not there, or is quantized.
    """
    chosen = {option: bits for option in OPTIONS if (bits := getattr(config, option, KEEP)) in (AUTO, HALF)}
    narrowed, notes = list(weights), list[str]()
    config = replace(config, **{option: KEEP for option, bits in chosen.items() if bits == HALF})
    may_be = chosen and (is_packed(config) or HALF in chosen.values())
    if not may_be or config.compute_dtype != "float32":  # which is of 16 bits already
        return config, tuple(narrowed), notes
    try:
        plans = backend.plan_layers(weights, config)
    except ConfigError:  # whoever plans or loads them says why
        return config, tuple(narrowed), notes
    beside_packed = is_packed(config) and any(plan.quantized and plan.packed is not None for plan in plans)
    asked = [option for option, bits in chosen.items() if bits == HALF or beside_packed]
    for option in asked:
        if is_asked_before(option, chosen, weights):
            continue
        try:
            place = place_of(option, plans, weights)
        except ConfigError:
            if chosen[option] == HALF:
                raise
            continue
        own = weights[place]
        tied = [each for each, weight in enumerate(weights) if weight.tied_to == own.name]
        classes = [(option, own.module), *(("head", weights[each].module) for each in tied)]
        if chosen[option] == AUTO and not all(name in PLAIN[kind] for kind, name in classes):
            continue
        held = stored.get(own.name, otherwise)
        dtype = held if held in HALVES else "float16"
        config = replace(config, **{option: HALF})
        for each in (place, *tied):
            narrowed[each] = replace(weights[each], dtype=dtype)
        if held != dtype:
            notes.append(f"{own.name} is kept in {dtype}, rounded from {held}: {option}='keep' keeps it as it is")
    return config, tuple(narrowed), notes
