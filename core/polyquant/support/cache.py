"""Where polyquant keeps what it makes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from polyquant.errors import ConfigError
from polyquant.support.paths import require_utf8


def cache_folder() -> Path:
    """Where polyquant keeps what it makes: $POLYQUANT_CACHE, else the user's cache folder; it need not be there.

    Raises ConfigError where $POLYQUANT_CACHE can be no folder.
    """
    if explicit := os.environ.get("POLYQUANT_CACHE"):
        require_utf8(explicit)
        folder = Path(explicit).absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise ConfigError(f"POLYQUANT_CACHE is {explicit}, and {there} is no folder; set it to one, or unset it")
        return Path(explicit)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "polyquant"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "polyquant"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "polyquant"
