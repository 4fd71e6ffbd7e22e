"""The model with the formats of an assignment: quantized as it loads, or in a checkpoint that is made of it first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from polyquant.loaded import LoadedModel
from polyquant.loading.load import load
from polyquant.loading.quantize import quantize
from polyquant.searching.formats import Formats
from polyquant.support.cache import cache_folder
from polyquant.support.files import make_folder

KEPT = "compute_dtype"  # of what may be chosen anew as a checkpoint is loaded: what it is written in


class Loader:
    """Loads the model of `formats` with the formats that options name. Use `loader`.

    shared: options of a load that are no backend's. texts: what a calibrated rounding is calibrated on.
    """

    def __init__(self, formats: Formats, shared: Mapping[str, Any], texts: Sequence[str], folder: Path) -> None:
        self._formats, self._texts, self._folder = formats, texts, folder
        self._shared = {**shared, "cache": False}  # hundreds of formats, each for one measurement

    def load(self, own: Mapping[str, Any], out: Path | None = None, *, overwrite: bool = False) -> LoadedModel:
        """out: where the checkpoint stays that is made first; the backend quantizes as it loads where it makes none."""
        formats, name = self._formats, self._formats.backend.name
        options = formats.options(own)
        if not formats.made_first:
            return load(formats.path, name, **self._shared, **{**options, **formats.load_options})
        made = out or self._folder
        load_time = formats.backend.info.options.load_time - {KEPT}
        stored = {option: value for option, value in options.items() if option not in load_time}
        calibration = self._texts if formats.calibrated and self._texts else None
        quantize(formats.path, name, made, calibration=calibration, overwrite=overwrite or out is None,
                 **self._shared, **stored)  # fmt: skip
        return load(made, name, **self._shared, **formats.load_options)


@contextmanager
def loader(formats: Formats, shared: Mapping[str, Any], texts: Sequence[str]) -> Iterator[Loader]:
    """In the block, what is made lies in a folder of the cache that goes with it."""
    if not formats.made_first:
        yield Loader(formats, shared, texts, Path())
        return
    make_folder(parent := cache_folder())
    with TemporaryDirectory(prefix="search-", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Loader(formats, shared, texts, Path(folder) / "checkpoint")
