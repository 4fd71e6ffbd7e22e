"""Rounded activations in software: which loads can have them, and with which kernel."""

from __future__ import annotations

from msgspec.structs import replace

from polyquant.errors import ConfigError
from polyquant.isolated import handles
from polyquant.loading.settle import Settled
from polyquant.options import BackendOptions
from polyquant.packable import LIBRARY, PACKED, QUANTIZE, PackableOptions, is_packed

OPTION = "emulate_activations (--emulate-activations)"


def asked(config: BackendOptions, backend: str) -> BackendOptions:
    """`config` for a load that rounds activations: with the library's kernel, whose layers can.

    Raises ConfigError for options whose format rounds none, or does it itself, and for polyquant's packed layout.
    """
    _require_left(config, backend)
    if type(config).activations_of is BackendOptions.activations_of:
        raise _without(config, backend)
    if not isinstance(config, PackableOptions):
        return config
    if is_packed(config) or getattr(config, "experts", "") == QUANTIZE:
        given = f"kernel='{PACKED}'" if is_packed(config) else f"experts='{QUANTIZE}'"
        raise ConfigError(
            f"{given} multiplies in polyquant's packed layout, which rounds no activations: leave it out, or {OPTION}"
        )
    return replace(config, kernel=LIBRARY) if config.kernel == "auto" else config


def require(settled: Settled, backend: str) -> None:
    """Raises ConfigError where the format of no layer, as it is settled, has a way to round activations."""
    config = settled.options
    _require_left(config, backend)
    if not any(config.activations_of(weight) for weight in settled.weights):
        raise _without(config, backend)


def require_none(emulated: object, verb: str) -> None:
    """Raises ConfigError where what only a loaded model has is asked of a command that is about checkpoints."""
    if emulated:
        raise ConfigError(
            f"{OPTION} is for models that are loaded and run, and no checkpoint stores it: leave it out where you "
            f"{verb}, and give it to whoever loads the model (run, verify, compare)"
        )


def _require_left(config: BackendOptions, backend: str) -> None:
    if config.rounds_activations:
        raise ConfigError(
            f"{backend} rounds activations itself with these options, and nothing is left to emulate: leave "
            f"{OPTION} out"
        )


def _without(config: BackendOptions, backend: str) -> ConfigError:
    none = BackendOptions.activations_of
    others = [each.name for each in handles.backends() if each.options.activations_of is not none]
    scheme = f" ({config.scheme})" if config.scheme else ""
    return ConfigError(
        f"the kernels of {backend}'s format{scheme} multiply with activations as they are, so there is no rounding to "
        f"emulate: leave {OPTION} out, or take a format that rounds them, of {', '.join(others) or 'no backend here'}"
    )
