"""What a model's files hold, as one hash."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from polyquant.request import ModelSource


def content_hash(source: ModelSource) -> str:
    """Hash of a model's config and weight files, 64 hexadecimal digits; about a second for each GB, once a process."""
    digest = hashlib.sha256()
    for name in (*(("config.json",) if source.config else ()), *source.weight_files):
        path = source.path / name
        stat = path.stat()
        digest.update(_file_hash(path, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


@cache
def _file_hash(path: Path, size: int, changed: int) -> bytes:
    """size, changed: of the file, so that one that was changed is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
