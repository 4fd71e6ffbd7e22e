"""Checks of what the card declares beside its presets: other bits and schemes, compiling, offloading."""

from __future__ import annotations

import shutil
from typing import Any

from polyquant.errors import ConfigError
from polyquant.loading.records import total
from polyquant.models.resolve import resolve
from polyquant.options import describe_options
from polyquant.testing.check import FIRST, CheckFailed, NotApplicable, check, expect
from polyquant.testing.checks_bytes import plan_is_within_one_percent
from polyquant.testing.checks_files import saves_and_loads_back
from polyquant.testing.checks_layers import bits_and_schemes_are_declared
from polyquant.testing.subject import Subject

CLOSE = 0.02  # of the largest logit: a compiled model rounds elsewhere, another device has other kernels


@check(per="declared")
def what_is_declared_loads(subject: Subject, asked: str) -> None:
    """Bits, schemes and quant_methods of the card that no preset has load too, as planned, and run."""
    loaded = subject.loaded(asked)
    word, _, value = asked.partition("=")
    if word == "stored":
        made = subject.checkpoint(asked, FIRST)
        found = {str(resolve(made).stored_quantization["quant_method"])}
    else:
        quantized = [layer for layer in loaded.layers if layer.quantized]
        found = {layer.scheme if word == "scheme" else f"{layer.bits:g}" for layer in quantized}
    expect(value in found, f"{asked} is declared, and what loads with it has {', '.join(sorted(found)) or 'nothing'}")
    expect(loaded.logits(subject.tokens(loaded, 16)).isfinite().all(), "logits are not finite")
    bits_and_schemes_are_declared(subject, asked, FIRST)
    if subject.handle.can("plan_layers"):
        plan_is_within_one_percent(subject, asked, FIRST)
    if subject.capabilities.saves and subject.options(asked) is not None:
        saves_and_loads_back(subject, asked, FIRST)


@check(per="backend", needs=("compiles", "runs_on_torch"))
def compiles_with_torch(subject: Subject) -> None:
    """torch.compile takes the model of the first preset, and the logits stay what they were."""
    import torch

    if shutil.which("c++") is None and shutil.which("g++") is None and subject.runs_on == "cpu":
        raise NotApplicable("torch.compile needs a C++ compiler for the CPU, and none is installed")
    loaded = subject.load(next(iter(subject.info.presets)))
    tokens = torch.tensor([list(subject.tokens(loaded, 16))], device=subject.runs_on)
    expected = loaded.logits(tokens[0].tolist())
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(loaded.model)(input_ids=tokens).logits[0].float().cpu()
    _expect_close(expected, found, "compiled")


@check(per="backend", needs=("offloads", "runs_on_torch"))
def offloads_to_the_cpu(subject: Subject) -> None:
    """With half the room on its device the rest lives on the CPU, some option given where it must be; logits stay."""
    if subject.runs_on == "cpu":
        raise NotApplicable("nothing is offloaded from a CPU")
    preset = next(iter(subject.info.presets))
    whole = subject.loaded(preset)
    tokens = subject.tokens(whole, 16)
    room = {0: total(whole.initial_layers) // 2, "cpu": "8GiB"}
    options = describe_options(subject.info.options)
    tried: list[dict[str, Any]] = [{}, *({option.name: True} for option in options if option.default is False)]
    refusals = []
    for more in tried:
        try:
            loaded = subject.load(preset, max_memory=room, offload="cpu", **more)
        except ConfigError as error:
            refusals.append(f"with {more}: {error}")
            continue
        there = {layer.device.partition(":")[0] for layer in loaded.layers}
        expect("cpu" in there and len(there) > 1, f"with half the room the layers are on {', '.join(sorted(there))}")
        _expect_close(whole.logits(tokens), loaded.logits(tokens), "offloaded")
        return
    raise CheckFailed(f"offloads is declared, and offload='cpu' is refused {'; '.join(refusals)}")


def _expect_close(expected: Any, found: Any, how: str) -> None:
    off = float((expected - found).abs().max() / expected.abs().max())
    expect(off < CLOSE, f"{how}, its logits are {off:.1%} of the largest off")
