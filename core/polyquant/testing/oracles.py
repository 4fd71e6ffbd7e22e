"""A backend's numbers beside those of an oracle: code that others wrote, which computes the same.

Where POLYQUANT_ORACLES names a JSON file, the tests keep there what they saw; docs/reference/oracles.md is made of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from polyquant.support.files import write_atomically
from polyquant.types import Record

SETTING = "POLYQUANT_ORACLES"


class Agreement(Record, frozen=True):
    """How far a backend's numbers are from an oracle's."""

    difference: float  # the largest, over the largest number of the oracle's
    allowed: float  # by the test
    numbers: int  # that were compared
    test: str  # that compared them, as pytest names it


Agreements = dict[str, dict[str, Agreement]]
"""Backend -> oracle -> what was seen."""
_seen: Agreements = {}


def agree(backend: str, oracle: str, found: Any, expected: Any, *, allowed: float = 0.0) -> None:
    """Assert that `found` is what an oracle computes, and keep the largest difference of this run.

    oracle: in a few words, such as "gguf's dequantize". found, expected: tensors of one shape, of finite numbers.
    allowed: the largest difference, over the largest number of the oracle's; 0: none at all.
    """
    assert found.shape == expected.shape, f"{backend}: {tuple(found.shape)}, and {oracle}: {tuple(expected.shape)}"
    theirs = expected.detach().double()
    apart = float((found.detach().double() - theirs).abs().max()) / (float(theirs.abs().max()) or 1.0)
    assert apart <= allowed, f"{backend} is {apart:.3g} from {oracle}, and {allowed:g} is allowed"  # NaN is, too
    before = _seen.setdefault(backend, {}).get(oracle)
    one = Agreement(difference=apart, allowed=allowed, numbers=theirs.numel(), test=_test())
    if before is not None:
        numbers = before.numbers + one.numbers
        one = msgspec.structs.replace(before if before.difference > apart else one, numbers=numbers)
    _seen[backend][oracle] = one
    if path := os.environ.get(SETTING):
        _keep(Path(path), backend)


def read(path: Path) -> Agreements:
    """What was kept; nothing where the file is not there."""
    return msgspec.json.decode(path.read_bytes(), type=Agreements) if path.exists() else {}


def _keep(path: Path, backend: str) -> None:
    known = {**read(path), backend: _seen[backend]}
    text = msgspec.json.format(msgspec.json.encode(known, order="sorted"), indent=1).decode()
    write_atomically(path, text + "\n")


def _test() -> str:
    return os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
