"""How to search."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta


class SearchOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is tried, and on how much text; the defaults take some minutes for a small model on a CPU."""

    formats: Annotated[
        tuple[str, ...],
        Meta(description="formats to choose from, as in Q4_0,Q8_0; none: those of the backend's presets"),
    ] = ()
    by: Annotated[
        Literal["group", "layer"],
        Meta(
            description="what gets one format: layers of a block that read the same input (q, k, v; gate, up), or each"
        ),
    ] = "group"
    tokens: Annotated[int, Meta(description="tokens of calibration text that each change is measured on", ge=256)] = 256
    windows: Annotated[
        int, Meta(description="windows of 512 tokens of other text that what is found is measured on", ge=1)
    ] = 4
