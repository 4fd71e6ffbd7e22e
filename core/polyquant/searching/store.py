"""What has been measured already, in polyquant's cache: a search that was interrupted goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from polyquant.measure.quality.records import Quality
from polyquant.support.cache import cache_folder
from polyquant.support.files import make_folder, write_atomically
from polyquant.types import UNREADABLE, Record


class Measured(Record, frozen=True):
    """The figures of one model, backend and text."""

    kl: Mapping[str, Mapping[str, float]] = {}  # format -> unit -> nats a position
    uniform: Mapping[str, Quality] = {}  # format and reference -> the quality of everything in that format


class Store:
    """A file of figures, written anew after each; `asked` is all that determines them."""

    def __init__(self, asked: object) -> None:
        key = hashlib.sha256(repr(asked).encode()).hexdigest()[:32]
        self.path: Path = cache_folder() / "sensitivities" / f"{key}.json"
        try:
            there = msgspec.json.decode(self.path.read_bytes(), type=Measured)
        except (OSError, *UNREADABLE):
            there = Measured()  # measured again, and written over
        self._kl = {name: dict(units) for name, units in there.kl.items()}
        self._uniform = dict(there.uniform)

    def kl(self, chosen: str, unit: str) -> float | None:
        """What was measured of a unit in a format."""
        return self._kl.get(chosen, {}).get(unit)

    def uniform(self, chosen: str, reference: str) -> Quality | None:
        """What was measured of everything in a format."""
        return self._uniform.get(f"{chosen} {reference}")

    def keep_kl(self, chosen: str, unit: str, kl: float) -> None:
        self._kl.setdefault(chosen, {})[unit] = kl
        self._write()

    def keep_uniform(self, chosen: str, reference: str, quality: Quality) -> None:
        self._uniform[f"{chosen} {reference}"] = quality
        self._write()

    def _write(self) -> None:
        make_folder(self.path.parent)
        write_atomically(self.path, Measured(kl=self._kl, uniform=self._uniform).to_json())
