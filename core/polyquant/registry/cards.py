"""Cards in files: `card.json` beside a plugin's code says what its backends are, so that listing need not import it.

`polyquant write-card` writes one, `python docs/generate.py` those of this repository. A file is believed where
this polyquant made it, of the sources that lie beside it; else the code is asked.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from polyquant.options import BackendOptions
from polyquant.types import UNREADABLE, BackendInfo, Record

FILE = "card.json"
OptionsOf = Callable[[str], type[BackendOptions]]
"""Name of a backend -> the type of its options, which may import its plugin."""


class Written(Record, frozen=True):
    """What a file says of one backend."""

    info: dict[str, Any]  # its card; of the options' type, where it is defined
    hooks: tuple[str, ...]  # the optional ones that it has


class CardFile(Record, frozen=True):
    """A file: the backends of one package."""

    polyquant: str  # the version that wrote it
    sources: str  # see `checksum`
    backends: dict[str, Written]


class Card(NamedTuple):
    """What is known of a backend whose plugin is not imported."""

    info: BackendInfo
    hooks: tuple[str, ...]


class OptionsLater:
    """Stands in a card for the type of a backend's options, which is not imported yet."""

    def __init__(self, path: str, load: Callable[[], type[BackendOptions]]) -> None:
        self.path, self.load = path, load


class ListedInfo(BackendInfo, frozen=True):
    """A card that was read from a file; its `options` import the plugin when they are first asked for."""

    @property  # type: ignore[misc]  # in the place of a field
    def options(self) -> type[BackendOptions]:
        later: OptionsLater = BackendInfo.options.__get__(self)  # type: ignore[attr-defined]
        return later.load()


def as_json(value: object) -> object:
    """What a card has that JSON does not, the type of the options, for msgspec's `enc_hook`."""
    if isinstance(value, OptionsLater):
        return value.path
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    raise NotImplementedError(type(value))


def home_of(package: str) -> Path | None:
    """The folder of a top-level package, which is not imported; None where it is a single file, or not there."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def checksum(home: Path) -> str:
    """Of the sources that cards follow from: those of a package whose names do not begin with an underscore."""
    total = 0
    for path in _light_sources(str(home)):
        content = Path(path).read_bytes()
        total = zlib.crc32(content, zlib.crc32(path.removeprefix(str(home)).encode(), total))
    return f"{total:08x}"


def _light_sources(folder: str) -> Iterator[str]:
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    yield from (entry.path for entry in entries if entry.name.endswith(".py") and not entry.name.startswith("_"))
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith((".", "_")):
            yield from _light_sources(entry.path)


def read(package: str, options: OptionsOf) -> dict[str, Card]:
    """Backend -> its card, of the file in a package; empty where there is none, or none to be believed."""
    home = home_of(package)
    try:
        file = msgspec.json.decode((home / FILE).read_bytes(), type=CardFile) if home else None
        if home is None or file is None or (file.polyquant, file.sources) != (_version(), checksum(home)):
            return {}
        return {name: Card(_info(name, each.info, options), each.hooks) for name, each in file.backends.items()}
    except (OSError, KeyError, *UNREADABLE):
        return {}


def _info(name: str, written: Mapping[str, Any], options: OptionsOf) -> ListedInfo:
    """Raises KeyError or ValidationError where it is no card."""
    later = OptionsLater(written["options"], lambda: options(name))
    rest = {each: msgspec.convert(value, _kinds()[each]) for each, value in written.items() if each != "options"}
    return ListedInfo(options=later, **rest)  # type: ignore[arg-type]  # see `ListedInfo.options`


@cache
def _kinds() -> dict[str, Any]:
    """Field of a card -> its type."""
    return {field.name: field.type for field in msgspec.structs.fields(BackendInfo)}


@cache
def _version() -> str:
    return version("polyquant")


def text(home: Path, cards: Mapping[str, Card]) -> str:
    """What belongs into the file of a package with these backends."""
    backends = {
        name: Written(info=msgspec.to_builtins(card.info, enc_hook=as_json), hooks=card.hooks)
        for name, card in sorted(cards.items())
    }
    file = CardFile(polyquant=_version(), sources=checksum(home), backends=backends)
    return msgspec.json.format(msgspec.json.encode(file), indent=1).decode() + "\n"
