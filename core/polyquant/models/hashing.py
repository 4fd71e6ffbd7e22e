"""What a model's files hold, as one hash; those of large files are kept in the cache, with their size and time."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec

from polyquant.errors import SaveError
from polyquant.request import ModelSource
from polyquant.support.cache import cache_folder
from polyquant.support.files import make_folder, write_atomically
from polyquant.types import UNREADABLE, Record

LARGE_BYTES = 2**24  # of a file whose hash is worth keeping
SETTLED_SECONDS = 2.0  # a file that changed so lately may change again at the same time


class FileHash(Record, frozen=True):
    """The hash of a file as it was."""

    path: str
    size: int
    changed: int  # nanoseconds, as its status has it
    sha256: str


def content_hash(source: ModelSource) -> str:
    """Hash of a model's config and weight files, 64 hexadecimal digits; about a second for each GB, once."""
    digest = hashlib.sha256()
    for name in (*(("config.json",) if source.config else ()), *source.weight_files):
        path = source.path / name
        stat = path.stat()
        digest.update(_file_hash(path, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


@cache
def _file_hash(path: Path, size: int, changed: int) -> bytes:
    """size, changed: of the file, so that one that was changed is read again."""
    place = cache_folder() / "hashes" / f"{hashlib.sha256(bytes(path.resolve())).hexdigest()[:32]}.json"
    with suppress(OSError, msgspec.ValidationError, *UNREADABLE):
        known = msgspec.json.decode(place.read_bytes(), type=FileHash)
        if (known.path, known.size, known.changed) == (str(path.resolve()), size, changed):
            return bytes.fromhex(known.sha256)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256")
    if size >= LARGE_BYTES and time.time_ns() - changed > SETTLED_SECONDS * 1e9:
        own = FileHash(path=str(path.resolve()), size=size, changed=changed, sha256=found.hexdigest())
        with suppress(SaveError):  # a cache that cannot be written to keeps nothing
            make_folder(place.parent)
            write_atomically(place, own.to_json())
    return found.digest()
