"""What a model's files hold, as one hash."""

from __future__ import annotations

import hashlib

from polyquant.request import ModelSource


def content_hash(source: ModelSource) -> str:
    """Hash of a model's config and weight files, 64 hexadecimal digits; about a second for each GB."""
    digest = hashlib.sha256()
    for name in (*(("config.json",) if source.config else ()), *source.weight_files):
        with (source.path / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
