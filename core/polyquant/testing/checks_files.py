"""Checks of checkpoints: written safely, read back exactly, contradicted never."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polyquant
from polyquant import LoadedModel
from polyquant.errors import CheckpointConflict
from polyquant.isolated import handles
from polyquant.loading.records import total
from polyquant.measure.quality.divergence import kl_divergence, top1_agreement
from polyquant.options import BackendOptions
from polyquant.testing.check import FIRST, CheckFailed, NotApplicable, check, expect
from polyquant.testing.reference import reference_logits
from polyquant.testing.subject import Subject

CLOSE_KL = 1e-3  # nats a token: the same weights, in another compute dtype or kernel
LOSS_SHARE = 0.5  # of what quantizing lost: where activations are rounded too, the least difference becomes a step
AGREEMENT = 0.9  # of the likeliest tokens
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
def others_read_it_right_or_refuse_it(subject: Subject, preset: str) -> None:
    """transformers and other runtimes read what the card says they read, with the same answers; the rest is refused."""
    loaded = subject.loaded(preset)
    tokens = subject.tokens(loaded, 24)
    expected, said = loaded.logits(tokens), loaded.backend.capabilities.readable_by
    with TemporaryDirectory(dir=subject.folder) as folder:
        saved = loaded.save(Path(folder) / "out")
        found = _by_transformers(saved, tokens)
        if "transformers" in said:
            expect(found is not None, "the card says that transformers reads its checkpoints, and it refuses them")
            divergence = float(kl_divergence(expected, found).mean())
            lost = float(kl_divergence(reference_logits(subject.dense(FIRST), tokens), expected).mean())
            told = f"KL {divergence:.3g} nats a token, where quantizing lost {lost:.3g}"
            expect(
                divergence < max(CLOSE_KL, LOSS_SHARE * lost), f"transformers reads its checkpoint otherwise: {told}"
            )
        else:
            expect(
                found is None, "transformers loads its checkpoint, and the card does not say so: take readable_by in"
            )
        for reader in (info for info in handles.backends() if info.capabilities.runtime in said):
            if not handles.backend(reader.name).problems(subject.runs_on):
                other = polyquant.load(saved, reader.name, device=subject.runs_on).logits(tokens)
                agreement = float(top1_agreement(expected, other).float().mean())
                expect(agreement > AGREEMENT, f"{reader.name} reads its checkpoint otherwise: top-1 {agreement:.0%}")


def _by_transformers(folder: Path, tokens: Sequence[int]) -> Any:
    """The logits that plain transformers gives of a checkpoint, (tokens, vocabulary); None where it refuses it."""
    import torch
    from transformers import AutoModelForCausalLM

    from polyquant.models import versions

    try:
        with versions.progress_bars(enabled=False):
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception:
        return None
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([list(tokens)])).logits[0]


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
