"""The measurements of a search: every unit in every format, and every format for everything. What is known is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import sha256

from polyquant.comparison.cell.quality import measure_quality
from polyquant.comparison.cell.reference import dense_reference
from polyquant.loaded import LoadedModel
from polyquant.loading.dense import load_dense
from polyquant.measure.quality.records import Quality
from polyquant.models.hashing import content_hash
from polyquant.models.hf import load_tokenizer
from polyquant.models.resolve import resolve_dense
from polyquant.plugin.calibration import token_windows
from polyquant.searching.formats import Formats
from polyquant.searching.knapsack import Choice
from polyquant.searching.options import SearchOptions
from polyquant.searching.sensitivity import Reference
from polyquant.searching.store import Store
from polyquant.searching.units import Unit
from polyquant.support.machine import this_machine
from polyquant.support.progress import Progress, Step
from polyquant.support.texts import evaluation_text

WINDOW = 256  # tokens of a window of calibration text


class Measuring:
    """Measures with one dense model and one quantized one in memory at a time.

    load: the model with these options, quantized. texts: what units are measured on; none: the prose that comes with
    polyquant. What the whole model is measured on is another text.
    """

    def __init__(
        self, formats: Formats, load: Callable[[dict[str, object]], LoadedModel],
        options: SearchOptions, texts: Sequence[str], progress: Progress,
    ) -> None:  # fmt: skip
        self._formats, self._load, self._progress = formats, load, progress
        self._planned = next(iter(formats.uniform.values()))
        tokenizer = load_tokenizer(self._planned.source)
        count = -(-options.tokens // WINDOW)
        self._windows = token_windows(tokenizer, texts, length=WINDOW, count=count)
        source = resolve_dense(self._planned.source.path)
        self._folder, self._key = dense_reference(source, evaluation_text(), limit=options.windows, progress=progress)
        libraries = [library.distribution for library in formats.backend.info.libraries]
        self._store = Store((
            content_hash(source), formats.backend.name, sorted(formats.given.items()), self._planned.settled.device,
            self._planned.settled.dtype, sha256(repr(self._windows).encode()).hexdigest(),
            sorted(this_machine(libraries).versions.items()),
        ))  # fmt: skip

    def everything(self, units: Sequence[Unit]) -> None:
        """Measure what is not known yet, one format after the other."""
        for name in self._formats.uniform:
            missing = [unit for unit in units if self._store.kl(name, unit.name) is None]
            whole = self._store.uniform(name, self._key) is None
            if not (missing or whole):
                continue
            self._progress.step(Step(what=f"loading {name}"))
            loaded = self._load(self._formats.of_all(name))
            if whole:
                self._store.keep_uniform(name, self._key, self.quality(loaded))
            for done, unit in enumerate(missing, 1):
                self._store.keep_kl(name, unit.name, self._reference.kl(loaded.model, unit.modules))
                self._progress.step(Step(what=f"{name} in one part at a time", done=done, of=len(missing)))
        vars(self).pop("_reference", None)  # what follows needs its memory

    def uniform(self, name: str) -> Quality:
        """Of everything in one format."""
        found = self._store.uniform(name, self._key)
        assert found is not None  # `everything` measured it
        return found

    def choices(self, unit: Unit) -> list[Choice]:
        """The formats of a unit, with their bytes and what was measured."""
        found = []
        for name in self._formats.uniform:
            kl = self._store.kl(name, unit.name)
            assert kl is not None  # `everything` measured it
            found.append(Choice(name, self._formats.nbytes(name, unit.modules), kl))
        return found

    def quality(self, loaded: LoadedModel) -> Quality:
        """Of a whole model, on text that nothing was chosen by."""
        return measure_quality(loaded, self._folder, self._key, self._progress)

    @cached_property
    def _reference(self) -> Reference:
        settled = self._planned.settled
        self._progress.step(Step(what="loading the dense model"))
        return Reference(load_dense(self._planned.source, settled.dtype, settled.device), self._windows)
