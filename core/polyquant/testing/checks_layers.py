"""Checks of the description of layers: everything named once, honestly, and the skip list obeyed."""

from __future__ import annotations

from collections import Counter

from polyquant.errors import ConfigError
from polyquant.loading import checks
from polyquant.testing.check import CheckFailed, check, expect
from polyquant.testing.models import ARCHITECTURES
from polyquant.testing.subject import Subject

SKIPPED = "layers.0.mlp"


@check(per="model", models=tuple(ARCHITECTURES), needs=("runs_on_torch",))
def describes_every_tensor_once(subject: Subject, preset: str, model: str) -> None:
    """Every parameter and buffer is described once, under its own name or as part of its module's quantized weight."""
    loaded = subject.loaded(preset, model)
    layers = loaded.layers
    twice = [name for name, count in Counter(layer.name for layer in layers).items() if count > 1]
    expect(not twice, f"described more than once: {', '.join(twice[:5])}")
    names = {layer.name for layer in layers}
    packed = {layer.name.rpartition(".")[0] for layer in layers if layer.quantized}
    owned = [name for name, _ in loaded.model.named_parameters(remove_duplicate=False)]
    owned += [name for name, _ in loaded.model.named_buffers()]
    missing = [name for name in owned if name not in names and not _within(name, packed)]
    expect(not missing, f"not described: {', '.join(missing[:5])}")


@check(per="model", models=tuple(ARCHITECTURES))
def bits_and_schemes_are_declared(subject: Subject, preset: str, model: str) -> None:
    """Quantized tensors have bits and a scheme that the card declares, and name their kernel."""
    bits, schemes = subject.capabilities.bits, subject.capabilities.schemes
    for layer in subject.loaded(preset, model).layers:
        if layer.quantized:
            expect(layer.bits in bits, f"{layer.name} has {layer.bits} bits; declared: {bits}")
            expect(layer.scheme in schemes, f"{layer.name} has scheme {layer.scheme!r}; declared: {schemes}")
            expect(layer.kernel, f"{layer.name} does not name the kernel that multiplies with it")


@check(per="model", models=tuple(ARCHITECTURES))
def dense_tensors_have_reasons(subject: Subject, preset: str, model: str) -> None:
    """Every tensor that is not quantized says why."""
    found = checks.reasons(subject.loaded(preset, model).layers)
    expect(found.passed, found.found)


@check(per="model", models=("llama", "llama-tied", "qwen2"))
def covers_the_model(subject: Subject, preset: str, model: str) -> None:
    """The weights in the blocks of an ordinary model are quantized, at least 95 % of them."""
    found = checks.coverage(subject.loaded(preset, model).layers)
    expect(found.passed, f"expected {found.expected}, found {found.found}")


@check(needs=("on_the_fly",))
def skipped_modules_stay_dense(subject: Subject, preset: str) -> None:
    """Modules that `skip` matches stay dense and say so; the others are quantized as before."""
    usual = {layer.name for layer in subject.loaded(preset).layers if layer.quantized}
    layers = {layer.name: layer for layer in subject.load(preset, skip=(SKIPPED,)).layers}
    quantized = {name for name, layer in layers.items() if layer.quantized}
    skipped = {name for name in usual if f".{SKIPPED}." in f".{name}"}
    expect(skipped, f"nothing below {SKIPPED} is quantized without skip")
    expect(not quantized & skipped, f"quantized all the same: {', '.join(sorted(quantized & skipped)[:5])}")
    changed = sorted(usual - skipped ^ quantized)
    expect(not changed, f"skip changes other modules: {', '.join(changed[:5])}")
    for name in skipped & set(layers):
        expect(layers[name].reason == "skipped on request", f"{name} says {layers[name].reason!r}")


@check(needs=("on_the_fly",))
def a_skip_pattern_without_a_match_is_refused(subject: Subject, preset: str) -> None:
    """A pattern that matches no module is a ConfigError, before anything is loaded."""
    try:
        subject.load(preset, skip=("no_such_module",))
    except ConfigError as error:
        expect("no_such_module" in str(error), f"the refusal does not name the pattern: {error}")
    else:
        raise CheckFailed("skip=('no_such_module',) was accepted")


def _within(name: str, modules: set[str]) -> bool:
    """Whether the tensor `name` belongs to one of `modules`, or to a module inside one."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts)))
