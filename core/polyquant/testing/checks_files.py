"""Checks of checkpoints: written safely, read back exactly, contradicted never."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polyquant
from polyquant import LoadedModel
from polyquant.errors import CheckpointConflict
from polyquant.loading.records import total
from polyquant.options import BackendOptions
from polyquant.testing.check import CheckFailed, NotApplicable, check, expect
from polyquant.testing.subject import Subject

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SKIP: dict[str, Any] = {"skip": ("layers.0",)}  # contradicts every checkpoint that was made without it


@check(per="model", models=("llama", "llama-tied", "odd"), needs=("saves",))
def saves_and_loads_back(subject: Subject, preset: str, model: str) -> None:
    """A saved model loads back with the same logits, bytes and options: before and after it ran, and a second time."""
    loaded = subject.load(preset, model)
    tokens = subject.tokens(loaded, 40)
    with TemporaryDirectory(dir=subject.folder) as folder:
        fresh = loaded.save(Path(folder) / "fresh")
        expected = loaded.logits(tokens)
        used, again = loaded.save(Path(folder) / "used"), loaded
        for name, saved in (("before it ran", fresh), ("after a forward pass", used), ("a second time", None)):
            path = saved or again.save(Path(folder) / "again")
            again = polyquant.load(path, subject.backend, device=subject.runs_on)
            same = bool((again.logits(tokens) == expected).all())
            expect(same, f"saved {name}, loaded back, it gives other logits")
            _expect_same(loaded, again)


@check(needs=("saves",))
def writes_no_pickle(subject: Subject, preset: str) -> None:
    """Saving writes no file that runs code when it is read."""
    with TemporaryDirectory(dir=subject.folder) as folder:
        out = subject.loaded(preset).save(Path(folder) / "out")
        pickles = [path.name for path in out.rglob("*") if path.suffix in PICKLES]
    expect(not pickles, f"writes {', '.join(pickles)}; use safetensors")


@check()
def contradicting_options_are_refused(subject: Subject, preset: str) -> None:
    """A quantized checkpoint loads with the options it was made with; others are a CheckpointConflict."""
    if not subject.capabilities.on_the_fly:
        _expect_refused(subject, preset, subject.source(preset, "llama")[0])
    elif subject.capabilities.saves:
        with TemporaryDirectory(dir=subject.folder) as folder:
            _expect_refused(subject, preset, str(subject.loaded(preset).save(Path(folder) / "out")))
    else:
        raise NotApplicable(f"{subject.backend} writes no checkpoint that options could contradict")


def _expect_refused(subject: Subject, preset: str, path: str) -> None:
    device, own = subject.runs_on, dict[str, Any](subject.info.presets[preset])
    stored = polyquant.load(path, subject.backend, device=device, **own).config
    others: list[dict[str, Any]] = [*map(dict, subject.info.presets.values()), SKIP]
    for options in [options for options in others if _differ(stored, options)]:
        try:
            polyquant.load(path, subject.backend, device=device, **options)
        except CheckpointConflict as error:
            named = [name for name in options if name in str(error)]
            expect(named, f"the refusal of {options} names none of the options: {error}")
        else:
            raise CheckFailed(f"a checkpoint of {preset} was loaded with {options}")


def _differ(stored: BackendOptions, options: Mapping[str, object]) -> bool:
    """Whether any of `options` contradicts what is stored; a load-time option of the base record never does."""
    free = BackendOptions.load_time
    return any(name not in free and getattr(stored, name) != value for name, value in options.items())


def _expect_same(loaded: LoadedModel, again: LoadedModel) -> None:
    before, after = total(loaded.initial_layers), total(again.initial_layers)
    expect(before == after, f"{before} bytes were loaded, {after} are loaded back")
    expect(again.config == loaded.config, f"{loaded.config} was saved, {again.config} is loaded back")
