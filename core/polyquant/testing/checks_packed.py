"""Checks of the packed runtime: kernel="packed" is the same weights, planned, described, trained on and saved."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import polyquant
from polyquant.errors import ConfigError
from polyquant.loaded import LoadedModel
from polyquant.measure.quality.divergence import kl_divergence
from polyquant.memory.effective import effective_weight
from polyquant.testing.check import FIRST, NotApplicable, check, expect
from polyquant.testing.checks_bytes import described_bytes_are_stored_bytes, plan_is_within_one_percent
from polyquant.testing.checks_outputs import logits_are_whole
from polyquant.testing.checks_train import adapters_merge_or_are_refused, adapters_train_on_the_frozen_base
from polyquant.testing.models import ARCHITECTURES
from polyquant.testing.reference import reference_logits
from polyquant.testing.subject import Subject

SAME_KL = 1e-5  # nats a token: the same weights, both computed in float32
MORE_LOST = 1.1  # of what the library loses, where that rounds activations too
SAME, CLOSE = 1e-4, 1e-2  # of the largest weight, where the library multiplies in float32, or in 16 bits
HALF = 2**-11  # and where it takes float32, and multiplies with weights that it has rounded to float16
SMALL_SHARE = 0.5  # of the quantized layers may keep the library's kernel, as those of odd sizes do


@check(per="model", models=tuple(ARCHITECTURES))
def packed_weights_are_the_librarys(subject: Subject, preset: str, model: str) -> None:
    """With kernel="packed" the model answers as with the library's, its layers have its schemes and planned bytes."""
    packed = subject.packed
    loaded = packed.loaded(preset, model)
    own = [layer for layer in loaded.initial_layers if layer.quantized and layer.kernel.startswith("packed")]
    quantized = [layer for layer in loaded.initial_layers if layer.quantized]
    expect(
        len(own) >= SMALL_SHARE * len(quantized) or model != FIRST or _has_no_place(subject, preset, loaded),
        f"{len(own)} of {len(quantized)} quantized layers are in the packed layout",
    )
    described_bytes_are_stored_bytes(packed, preset, model)
    plan_is_within_one_percent(packed, preset, model)
    logits_are_whole(packed, preset, model)
    library, tolerance = _by_the_library(subject, preset, model)
    theirs, mine = ({(each.name, each.scheme, each.bits) for each in one.initial_layers if each.quantized}
                    for one in (library, loaded))  # fmt: skip
    expect(
        theirs == mine, f"its layers are others than the library's: {', '.join(map(str, sorted(theirs ^ mine)[:3]))}"
    )
    computes_in = getattr(torch, library.config.compute_dtype)
    for layer in own:
        name = layer.name.rpartition(".")[0]
        weight = loaded.model.get_submodule(name).dequantize()
        theirs_whole = effective_weight(library.model.get_submodule(name), weight.shape[1], dtype=computes_in)
        share = float((theirs_whole - weight).abs().max() / weight.abs().max())
        allowed = max(tolerance, HALF) if torch.equal(theirs_whole.half().float(), theirs_whole) else tolerance
        expect(share <= allowed, f"{name}: its weights are up to {share:.2g} of the largest off the library's")
    tokens = subject.tokens(library, 24)
    reference = reference_logits(subject.dense(model), tokens)
    expected, found = library.logits(tokens), loaded.logits(tokens)
    divergence = float(kl_divergence(expected, found).mean())
    lost, loses = (float(kl_divergence(reference, each).mean()) for each in (expected, found))
    expect(
        divergence <= SAME_KL or loses <= MORE_LOST * lost,
        f"it answers otherwise than the library: KL {divergence:.3g} nats a token to it, and {loses:.3g} to the dense "
        f"model, to which the library has {lost:.3g}",
    )


@check(needs=("trains",))
def packed_layers_train(subject: Subject, preset: str) -> None:
    """With kernel="packed" adapters train on the frozen base, and merge into it or are refused."""
    adapters_train_on_the_frozen_base(subject.packed, preset)
    adapters_merge_or_are_refused(subject.packed, preset)


@check(needs=("saves",))
def packed_models_save_what_the_library_does(subject: Subject, preset: str) -> None:
    """What is saved with kernel="packed" loads back in the library's format with the same logits, bit for bit."""
    loaded = subject.packed.load(preset)
    tokens = subject.tokens(loaded, 24)
    dtype = loaded.config.compute_dtype
    with TemporaryDirectory(dir=subject.folder) as folder:
        saved = [each.save(Path(folder) / name) for name, each in (
            ("packed", loaded), ("library", subject.load(preset, kernel="library", compute_dtype=dtype)))]  # fmt: skip
        one, two = (polyquant.load(each, subject.backend, device=subject.runs_on).logits(tokens) for each in saved)
        again = polyquant.load(saved[0], subject.backend, device=subject.runs_on, kernel="packed").logits(tokens)
    expect(bool((one == two).all()), "saved with the packed kernel, and loaded back, it gives other logits")
    expect(bool((again == loaded.logits(tokens)).all()), "loaded back with the packed kernel it gives other logits")


def _has_no_place(subject: Subject, preset: str, loaded: LoadedModel) -> bool:
    """Whether no layer of a preset is planned in the packed layout, as 3 bits may be; the first preset has to be."""
    assert loaded.settled is not None  # every load sets it
    plans = subject.handle.plan_layers(loaded.settled.weights, loaded.config)
    return preset != next(iter(subject.info.presets)) and all(plan.packed is None for plan in plans)


def _by_the_library(subject: Subject, preset: str, model: str) -> tuple[LoadedModel, float]:
    """The model with the library's own kernel, in float32 where it has one; and how far its weights may be off."""
    try:
        return subject.load(preset, model, kernel="library", compute_dtype="float32"), SAME
    except (ConfigError, NotApplicable):
        return subject.load(preset, model, kernel="library"), CLOSE
