"""Checks of the packed runtime: kernel="packed" is the same weights, planned, described, trained on and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import polyquant
from polyquant.converting.convert import converted
from polyquant.converting.source import of_loaded
from polyquant.errors import ConfigError, ConversionRefused
from polyquant.loaded import LoadedModel
from polyquant.loading.dense import load_dense
from polyquant.measure.quality.divergence import kl_divergence
from polyquant.memory.effective import effective_weight
from polyquant.models.resolve import resolve_dense
from polyquant.packable import KEEP, QUANTIZE
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
ROUNDED = 2**-10  # of the largest weight: what a scale's or a minimum's dtype may round
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
    experts = [layer.name for layer in own if layer.role == "experts"]
    ours = bool(experts) and hasattr(loaded.config, "experts")  # else the backend packs experts itself
    library, tolerance = _by_the_library(subject, preset, model, {"experts": QUANTIZE} if ours else {})
    theirs, mine = ({(each.name, each.scheme, each.bits) for each in one.initial_layers if each.quantized}
                    for one in (library, loaded))  # fmt: skip
    expect(
        theirs == mine, f"its layers are others than the library's: {', '.join(map(str, sorted(theirs ^ mine)[:3]))}"
    )
    computes_in = getattr(torch, library.config.compute_dtype)
    linears = {layer.name.rpartition(".")[0] for layer in own if layer.role != "experts"}
    for name in linears:
        weight = loaded.model.get_submodule(name).dequantize()
        _require_same(name, weight, library.model.get_submodule(name), computes_in, tolerance)
    for name, weight, module in _some_experts(subject, model, loaded, experts if ours else ()):
        _require_same(name, weight, module, computes_in, tolerance)
    for name in () if ours else experts:
        stack, theirs_too = (one.model.get_submodule(name) for one in (loaded, library))
        for number, weight in enumerate(stack.packed):
            _require_same(
                f"expert {number} of {name}", weight.decode(), theirs_too.expert(number), computes_in, tolerance
            )
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


def _require_same(name: str, weight: torch.Tensor, module: Any, computes_in: torch.dtype, tolerance: float) -> None:
    """Whether a packed weight is the one that the library's module multiplies with."""
    is_table = hasattr(module, "num_embeddings")  # an embedding, whose rows are its answers
    theirs = module.dequantize() if is_table else effective_weight(module, weight.shape[1], dtype=computes_in)
    share = float((theirs - weight).abs().max() / weight.abs().max())
    allowed = max(tolerance, HALF) if torch.equal(theirs.half().float(), theirs) else tolerance
    expect(share <= allowed, f"{name}: its weights are up to {share:.2g} of the largest off the library's")


def _some_experts(
    subject: Subject, model: str, loaded: LoadedModel, names: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Of each tensor of experts, the last one's name and packed weight, and what the library makes of the dense one."""
    dense: Any = load_dense(resolve_dense(subject.dense(model))) if names else None
    for name in names:
        stack = loaded.model.get_submodule(name)
        matrix = dense.get_parameter(name)[-1].detach().float()
        linear = torch.nn.Linear(*reversed(stack.shape), bias=False)
        linear.weight = torch.nn.Parameter((matrix.T if stack.transposed else matrix).contiguous(), requires_grad=False)
        module = subject.handle.quantize_linear(linear, loaded.config)
        yield f"the last expert of {name}", stack.packed[-1].decode(), module


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


@check()
def converted_layers_are_the_same(subject: Subject, preset: str) -> None:
    """`polyquant convert` writes its own format from the packed layout: each layer is read back as it was."""
    if not subject.handle.can("unpack"):
        raise NotApplicable(f"{subject.backend} does not declare a hook unpack")
    loaded = subject.packed.load(preset, embeddings=KEEP, head=KEEP)
    with TemporaryDirectory(dir=subject.folder) as folder:
        try:
            out = Path(folder)
            made = converted(of_loaded(loaded), subject.handle, {}, out, progress=False, trusts={})
        except ConversionRefused as refused:
            expect(preset != next(iter(subject.info.presets)), f"its format does not hold its first preset: {refused}")
            raise NotApplicable(str(refused)) from refused
    expect(bool(made.layers), "no layer of it is in the packed layout")
    wrong = [layer.name for layer in made.layers if layer.largest_difference > ROUNDED * layer.largest_weight]
    expect(not wrong, f"{len(wrong)} of {len(made.layers)} layers are read back as others: {', '.join(wrong[:3])}")


def _has_no_place(subject: Subject, preset: str, loaded: LoadedModel) -> bool:
    """Whether no layer of a preset is planned in the packed layout, as 3 bits may be; the first preset has to be."""
    assert loaded.settled is not None  # every load sets it
    plans = subject.handle.plan_layers(loaded.settled.weights, loaded.config)
    return preset != next(iter(subject.info.presets)) and all(plan.packed is None for plan in plans)


def _by_the_library(subject: Subject, preset: str, model: str, more: Mapping[str, str]) -> tuple[LoadedModel, float]:
    """The model with the library's own kernel, in float32 where it has one; and how far its weights may be off.

    more: options for what the library does not multiply with in any case.
    """
    try:
        return subject.load(preset, model, kernel="library", compute_dtype="float32", **more), SAME
    except (ConfigError, NotApplicable):
        return subject.load(preset, model, kernel="library", **more), CLOSE
