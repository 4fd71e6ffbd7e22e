"""Paths that everything can name."""

from __future__ import annotations

from pathlib import Path

from polyquant.errors import ConfigError


def require_utf8(path: str | Path) -> None:
    """Raises ConfigError where a path, or another word, is no UTF-8: neither JSON nor the libraries can hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = str(path).encode(errors="surrogateescape")
        raise ConfigError(f"{shown!r} is no UTF-8, and cannot be used; rename that file or folder") from None
