"""What `from_stored` of several backends asks of a checkpoint's quantization_config."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def require_read(stored: Mapping[str, Any], read: Collection[str]) -> None:
    """Raises ValueError for settings that are none of those that are read, and have a value."""
    unread = sorted(name for name in stored if name not in read and stored[name] is not None)
    if unread:
        raise ValueError(f"it has {', '.join(unread)}, which is not read")


def usual_options(stored: Mapping[str, Any], dense: Sequence[str] | None) -> dict[str, Any]:
    """The options that each backend has. dense: modules that the config keeps dense; None: it does not say."""
    return {
        "compute_dtype": stored.get("compute_dtype", "auto"),
        "skip": tuple(dense or ()),
        "skip_defaults": dense is None,
    }
