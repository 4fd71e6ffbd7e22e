"""The index of stored log-probabilities: what a folder of them holds, read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from polyquant.measure.quality.windows import Window
from polyquant.types import UNREADABLE, Record

INDEX = "reference.json"


class StoredReference(Record, frozen=True):
    """What a folder of stored log-probabilities holds."""

    key: str  # hash of the model, the tokens and the preset
    preset: str
    windows: list[Window]
    vocabulary: int
    storage_error: float  # mean KL(stored || exact), nats
    spelled: Mapping[int, str] = {}  # each token of the windows as the reference's tokenizer spells it


def index_of(folder: Path) -> StoredReference | None:
    """What `folder` holds; None where there is nothing that can be read."""
    try:
        index = msgspec.json.decode((folder / INDEX).read_bytes(), type=StoredReference)
    except (OSError, *UNREADABLE):
        return None
    true = all(1 <= window.first_scored <= len(window.tokens) for window in index.windows)
    return index if true else None


def stored_in(folder: Path, key: str) -> StoredReference | None:
    """What `folder` holds; None where it is absent, unreadable or of another key."""
    index = index_of(folder)
    return index if index and index.key == key else None
