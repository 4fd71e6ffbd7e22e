"""The pluggy markers: plugins import `hookimpl`; `hookspec` marks the specification itself."""

from __future__ import annotations

from typing import Final

import pluggy

PROJECT: Final = "polyquant"
ENTRY_POINT_GROUP: Final = "polyquant.backends"

hookspec: Final = pluggy.HookspecMarker(PROJECT)
hookimpl: Final = pluggy.HookimplMarker(PROJECT)
