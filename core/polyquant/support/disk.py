"""How fast a disk is read: measured once, in at most a second, and kept in the user's cache."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from polyquant.support.cache import cache_folder
from polyquant.types import UNREADABLE

KEPT = "disks.json"  # device number -> bytes a second
PIECE, MOST_BYTES, SECONDS = 2**20, 2**26, 0.4  # of writing, and again of reading


def read_rate(folder: Path) -> float | None:
    """Bytes a second that the disk of a folder, which is made, reads one after the other; None: not to be measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        device = str(folder.stat().st_dev)
        known = _known()
        if device not in known:
            known[device] = _measured(folder)
            cache_folder().mkdir(parents=True, exist_ok=True)
            (cache_folder() / KEPT).write_bytes(msgspec.json.encode(known))
    except OSError:
        return None
    return known[device]


def _known() -> dict[str, float]:
    with suppress(OSError, *UNREADABLE):
        return msgspec.json.decode((cache_folder() / KEPT).read_bytes(), type=dict[str, float])
    return {}


def _measured(folder: Path) -> float:
    """Write a file, have the system forget it, and read it."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".rate-", buffering=0) as file:
        piece, written, start = os.urandom(PIECE), 0, time.perf_counter()
        while written < MOST_BYTES and (not written or time.perf_counter() - start < SECONDS):
            written += file.write(piece)
            os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        seen, into, start = 0, bytearray(PIECE), time.perf_counter()
        while (count := file.readinto(into)) and (seen := seen + count) and time.perf_counter() - start < SECONDS:
            pass
        return seen / (time.perf_counter() - start)
