"""Where an installed distribution came from, so that the same one is installed in another environment."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from polyquant.types import UNREADABLE


def arguments_for(distribution: str) -> tuple[str, ...]:
    """What to give pip: the same folder (editable where it is here), file or commit, else the same version.

    direct_url.json tells: https://packaging.python.org/en/latest/specifications/direct-url/.
    """
    found = metadata.distribution(distribution)
    version = f"{found.name}=={found.version}"
    try:
        origin: dict[str, Any] = msgspec.json.decode(found.read_text("direct_url.json") or "{}", type=dict[str, Any])
        url = str(origin.get("url", ""))
    except UNREADABLE:
        return (version,)
    if "vcs_info" in origin:
        vcs = origin["vcs_info"]
        return (f"{found.name} @ {vcs['vcs']}+{url}@{vcs['commit_id']}",)
    if url.startswith("file:"):
        from urllib.parse import urlparse
        from urllib.request import url2pathname  # with http and ssl: listing backends needs none of it

        path = Path(url2pathname(urlparse(url).path))
        if not path.exists():
            return (version,)
        return ("-e", str(path)) if origin.get("dir_info", {}).get("editable") else (str(path),)
    return (f"{found.name} @ {url}",) if url else (version,)
