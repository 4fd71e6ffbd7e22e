"""Which presets store weights in the same scheme, and which declared schemes and bits no preset has.

One preset of a scheme is enough on every architecture but the first.

A preset chooses how numbers are rounded and in which scheme they are stored. What an architecture can break is the
storing: sizes, tied tensors, biases, fused experts. How numbers are rounded shows on any of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from polyquant.errors import PolyquantError
from polyquant.registry.backend import Backend
from polyquant.registry.written import reaching, values_of, words_of
from polyquant.types import WeightInfo

PROBE = WeightInfo(
    name="model.layers.0.mlp.up_proj.weight", shape=(512, 256), dtype="bfloat16", role="linear", module="Linear"
)
"""A weight of the tiny llama."""


def run_everywhere(handle: Backend) -> list[str]:
    """The presets that run on every tiny model: the first one of each scheme, in the card's order.

    A preset's scheme is what the backend's `plan_layers` says of a weight, with its bits; `plan_is_within_one_percent`
    holds that against the loaded layers of every preset. Of a backend that does not plan, or does not plan this weight,
    every preset counts as a scheme of its own.
    """
    schemes = {preset: _scheme(handle, options) for preset, options in handle.info.presets.items()}
    firsts = {scheme: preset for preset, scheme in reversed(schemes.items()) if scheme is not None}
    return [preset for preset, scheme in schemes.items() if scheme is None or firsts[scheme] == preset]


def not_in_presets(handle: Backend) -> dict[str, Mapping[str, object] | None]:
    """What the card declares and no preset has -> options that come to it; None: only checkpoints of others are so.

    Such as 'scheme=Q4_K', 'bits=3' and 'stored=gptq', of quant_method. Bits that come with such a scheme are left out.
    """
    shown = {said for options in handle.info.presets.values() if (said := _declared(handle, options))}
    found: dict[str, Mapping[str, object] | None] = {}
    for scheme in handle.info.capabilities.schemes:
        if scheme not in {each for each, _ in shown}:
            options = found[f"scheme={scheme}"] = _first(handle, "scheme", scheme)
            if options is not None and (said := _declared(handle, options)):
                shown.add(said)
    for bits in handle.info.capabilities.bits:
        if bits not in {each for _, each in shown}:
            found[f"bits={bits:g}"] = _first(handle, "bits", bits)
    methods = handle.info.capabilities.loads_prequantized
    return found | {f"stored={method}": _stored_as(handle, method) for method in methods[1:]}


def _first(handle: Backend, word: str, value: object) -> Mapping[str, object] | None:
    """The first options that come to a word of a query; where the backend has an option of that name, its own."""
    own = {} if word in words_of(handle.info) else {word: value}
    try:
        return next(iter(reaching(handle.info, {} if own else {word: value}, own)), None)
    except PolyquantError:
        return None


def _stored_as(handle: Backend, method: str) -> Mapping[str, object] | None:
    for option, value in values_of(handle.info):
        try:
            if handle.config({option: value}).to_stored().get("quant_method") == method:
                return {option: value}
        except (PolyquantError, NotImplementedError):
            continue
    return None


def _declared(handle: Backend, options: Mapping[str, object]) -> tuple[str, float] | None:
    """Scheme and bits of options, as planned or as they say themselves; None where they fail: checks say how."""
    if (planned := _scheme(handle, options)) is not None:
        return planned
    try:
        config = handle.config(options)
        return config.scheme, config.weight_bits
    except Exception:  # a backend's code, which is asked here before it is checked
        return None


def _scheme(handle: Backend, options: Mapping[str, object]) -> tuple[str, float] | None:
    """What the backend plans for the probe; None where it does not say."""
    if not handle.can("plan_layers"):
        return None
    try:
        (planned,) = handle.plan_layers([PROBE], handle.config(options))
    except (PolyquantError, ValueError):
        return None
    return (planned.scheme, planned.bits) if planned.quantized else None
