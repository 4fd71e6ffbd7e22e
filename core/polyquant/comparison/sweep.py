"""Sweeps: every candidate with each value of an option, the same for all backends. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

from polyquant.comparison.candidates import DENSE, Candidate, of_backend
from polyquant.errors import ConfigError
from polyquant.options import describe_options
from polyquant.types import BackendInfo

Sweep = Mapping[str, Sequence[object]]
"""Option -> the values that it takes in turn."""


def swept(candidates: Sequence[Candidate], sweep: Sweep, card: Callable[[str], BackendInfo]) -> list[Candidate]:
    """The candidates, each with every combination of the values; the dense model as it is: it has no such options.

    Raises ConfigError for a candidate that has not got an option, gives it itself, or is a checkpoint, and for a value
    that its backend does not take.
    """
    for option, values in sweep.items():
        if not values or isinstance(values, str):
            raise ConfigError(f"the sweep of {option} lists its values, as in sweep={{'group_size': [32, 64]}}")
    points = [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]
    if not sweep:
        return list(candidates)
    found: list[Candidate] = []
    for candidate in candidates:
        if candidate.backend == DENSE:
            found.append(candidate)
            continue
        if candidate.model:
            raise ConfigError(f"{candidate.name} is a checkpoint, whose options are stored: it cannot be swept")
        info = card(candidate.backend)
        _require(candidate, sweep, info)
        found += [_at(candidate, point, info) for point in points]
    return found


def _require(candidate: Candidate, sweep: Sweep, info: BackendInfo) -> None:
    known = [option.name for option in describe_options(info.options)]
    for option in sweep:
        if option not in known:
            raise ConfigError(
                f"{candidate.name} cannot be swept over {option}: {info.name} has {', '.join(known)}; "
                f"polyquant backends --option {option} lists the backends that have it"
            )
        if f"{option}=" in candidate.name:
            raise ConfigError(f"{candidate.name} gives {option} itself, and the sweep does: leave it out of one")


def _at(candidate: Candidate, point: Mapping[str, object], info: BackendInfo) -> Candidate:
    words = ",".join(f"{option}={value}" for option, value in point.items())
    name = f"{candidate.name}{',' if ':' in candidate.name else ':'}{words}"
    try:
        return of_backend(info, "", {**candidate.options, **point}, name=name, strict=False)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
