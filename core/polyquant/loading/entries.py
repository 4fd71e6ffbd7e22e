"""The entries of the cache of quantized weights: what is kept, what it takes, and what goes.

The least recently used entries go where all of them take more than $POLYQUANT_CACHE_SIZE.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from polyquant.errors import SaveError
from polyquant.support.cache import cache_folder
from polyquant.support.files import PARTIAL
from polyquant.support.sizes import parse_size
from polyquant.types import UNREADABLE, Record

FOLDER, ENTRY = "packed", "entry.json"
ABANDONED_SECONDS = 24 * 3600
SIZE, USUAL_SIZE = "POLYQUANT_CACHE_SIZE", "20GiB"


class Entry(Record, frozen=True):
    """One quantized model that is kept, without its tensors."""

    model: str
    backend: str
    options: dict[str, Any]
    versions: dict[str, str]
    created: str  # UTC, ISO 8601
    stored_bytes: int  # of the file of weights
    sha256: str  # of that file
    quantization_config: dict[str, Any]  # of the model's config
    is_transformers: bool  # whether that was an object of transformers', and no mapping
    notes: tuple[str, ...] = ()  # of the load that it was made in


class Kept(Record, frozen=True):
    """An entry, where it is and when it was used."""

    key: str
    folder: str
    used: str  # UTC, ISO 8601
    entry: Entry


def kept() -> list[Kept]:
    """What is kept, the last used first; entries that cannot be read are none."""
    found = []
    for folder in _folders():
        with suppress(OSError, msgspec.ValidationError, *UNREADABLE):
            entry = msgspec.json.decode((folder / ENTRY).read_bytes(), type=Entry)
            used = datetime.fromtimestamp((folder / ENTRY).stat().st_mtime, UTC).isoformat(timespec="seconds")
            found.append(Kept(key=folder.name, folder=str(folder), used=used, entry=entry))
    return sorted(found, key=lambda each: each.used, reverse=True)


def remove(folder: Path) -> None:
    """Delete an entry, with its lock. Raises SaveError where it cannot be."""
    delete(folder)
    if folder.exists():
        raise SaveError(f"{folder} cannot be deleted; see whether its files may be written")


def most_bytes() -> int:
    """What all entries may take. Raises ConfigError for a size that is none."""
    return parse_size(os.environ.get(SIZE) or USUAL_SIZE)


def make_room(limit: int, *, but: Path) -> None:
    """Delete the least recently used entries until all take at most `limit` bytes; `but` stays.

    And what killed writers have left a day ago.
    """
    for left in (cache_folder() / FOLDER).glob(f".*{PARTIAL}*"):
        with suppress(OSError):
            if left.is_dir() and time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                delete(left)
    rows = kept()
    taken = sum(each.entry.stored_bytes for each in rows)
    for each in reversed(rows):
        if taken > limit and Path(each.folder) != but:
            delete(Path(each.folder))
            taken -= each.entry.stored_bytes


def _folders() -> list[Path]:
    parent = cache_folder() / FOLDER
    return [path.parent for path in parent.glob(f"[!.]*/{ENTRY}")]


def delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        Path(f"{folder}.lock").unlink(missing_ok=True)
