"""Checks of loading: every architecture, every device, the state the model is in."""

from __future__ import annotations

from polyquant import LoadedModel
from polyquant.loading import checks
from polyquant.support.devices import available_devices
from polyquant.testing.check import NotApplicable, check, expect
from polyquant.testing.models import ARCHITECTURES
from polyquant.testing.subject import Subject


@check(per="model", models=tuple(ARCHITECTURES))
def loads(subject: Subject, preset: str, model: str) -> None:
    """Every preset loads on every architecture; unusual sizes may be refused, by an error of polyquant's own."""
    loaded = subject.loaded(preset, model)
    expect(isinstance(loaded, LoadedModel), f"load answered with {type(loaded).__name__}")
    expect(loaded.model is not None and loaded.tokenizer is not None, "the model or the tokenizer is missing")
    expect(loaded.kernel, "the kernel in use is not named")
    expect(any(layer.quantized for layer in loaded.layers), "nothing is quantized")


@check(needs=("runs_on_torch",))
def is_in_eval_mode(subject: Subject, preset: str) -> None:
    """The model is a torch module, as the card's runtime says, and comes in eval mode, all of its modules."""
    import torch

    model = subject.loaded(preset).model
    expect(isinstance(model, torch.nn.Module), f"runtime is 'torch', and the model is a {type(model).__name__}")
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    expect(not training, f"in training mode: {', '.join(training[:5])}")


@check()
def config_is_the_effective_one(subject: Subject, preset: str) -> None:
    """The config of the loaded model is what was asked for, settled, and the library's own config agrees."""
    loaded, options = subject.loaded(preset), subject.info.presets[preset]
    expect(type(loaded.config) is subject.info.options, f"the config is a {type(loaded.config).__name__}")
    expect(loaded.config.compute_dtype != "auto", "the compute dtype of the loaded model is still 'auto'")
    for name, value in options.items():
        found = getattr(loaded.config, name)
        expect(found == value, f"{name}={value!r} was asked for, the config says {found!r}")
    effective = checks.effective(loaded)
    expect(effective.passed, f"the library's own config reads {effective.found}")


@check()
def runs_on_every_declared_device(subject: Subject, preset: str) -> None:
    """The model loads and runs on each declared device that is here, and stays there."""
    ran = 0
    for support in subject.capabilities.devices:
        device = next((name for name in available_devices() if name.partition(":")[0] == support.type), None)
        if device is None or subject.handle.problems(device):
            continue
        loaded = subject.loaded(preset) if device == subject.runs_on else subject.load(preset, device=device)
        logits = loaded.logits([5, 6, 7])
        expect(logits.isfinite().all(), f"logits on {device} are not finite")
        astray = [layer.name for layer in loaded.layers if layer.device.partition(":")[0] != support.type]
        expect(not astray, f"not on {device}: {', '.join(astray[:5])}")
        ran += 1
    if not ran:
        raise NotApplicable("none of the declared devices can be used here")
