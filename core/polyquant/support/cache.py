"""Where polyquant keeps what it makes."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Where polyquant keeps what it makes: $POLYQUANT_CACHE, else the user's cache folder."""
    if explicit := os.environ.get("POLYQUANT_CACHE"):
        return Path(explicit)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "polyquant"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "polyquant"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "polyquant"
