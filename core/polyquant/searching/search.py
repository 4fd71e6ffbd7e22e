"""`polyquant.search`. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from polyquant.searching.records import Assignment
    from polyquant.support.progress import Progress


def search(
    model: str | Path,
    memory: int | str,
    backend: str = "gguf",
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    calibration: Sequence[str] = (),
    formats: Sequence[str] = (),
    by: Literal["group", "layer"] = "group",
    tokens: int = 256,
    windows: int = 4,
    progress: Progress | None = None,
    revision: str | None = None,
    **options: Any,
) -> Assignment:
    """The format of each layer that brings a model closest to the dense one in a budget of bytes; measured.

    Each part of the model is quantized alone, in each format, and the KL of its predictions to the dense model's is
    measured on calibration text; the assignment that has the least sum is loaded and measured on other text, and so is
    each format for everything. What was measured is kept in the cache: an interrupted search goes on.

    memory: bytes of the weights as they are stored, such as '100MiB'. backend: one that mixes formats.
    out: folder to write the checkpoint to. calibration: texts; none: the prose that comes with polyquant.
    formats, by, tokens, windows: see `polyquant.searching.options.SearchOptions`. options: what `load` takes; modules
        that `skip` or `layers` name stay as they say.
    Raises ConfigError, with the smallest size that is possible, for a smaller budget; UnsupportedOperation for a
    backend that gives all layers one format.

    >>> polyquant.search("builtin:smollm2", "100MiB", formats=("Q4_0", "Q5_0", "Q8_0")).command
    """
    from polyquant.options import convert
    from polyquant.searching.options import SearchOptions
    from polyquant.searching.run import search as run

    how = convert(SearchOptions, {"formats": tuple(formats), "by": by, "tokens": tokens, "windows": windows})
    target = Path(out) if out is not None else None
    return run(model, revision, memory, backend, options, how, calibration, target, progress, overwrite=overwrite)
