"""Checks of what the model answers: logits, text, and how close both stay to the dense model."""

from __future__ import annotations

import json
from pathlib import Path

from polyquant.testing.check import REAL, CheckFailed, NotApplicable, check, expect
from polyquant.testing.models import ARCHITECTURES
from polyquant.testing.reference import reference_logits
from polyquant.testing.subject import Subject

PROMPT = "The water of the lake"
NEW_TOKENS = 8


@check(per="model", models=tuple(ARCHITECTURES))
def logits_are_whole(subject: Subject, preset: str, model: str) -> None:
    """Logits are float32, (positions, vocabulary), finite and not all alike, for many tokens and for one."""
    loaded = subject.loaded(preset, model)
    vocabulary = json.loads((Path(subject.dense(model)) / "config.json").read_text())["vocab_size"]
    for count in (40, 1):
        logits = loaded.logits(subject.tokens(loaded, count))
        shape = (count, vocabulary)
        expect(tuple(logits.shape) == shape, f"{count} tokens give logits {tuple(logits.shape)}, {shape} was expected")
        expect(str(logits.dtype) == "torch.float32", f"logits are {logits.dtype}, float32 was expected")
        expect(logits.isfinite().all(), f"logits of {count} tokens are not finite")
        expect(logits.std() > 0, f"logits of {count} tokens are all alike")


@check()
def greedy_decoding_is_deterministic(subject: Subject, preset: str) -> None:
    """The same prompt gives the same text, whole and in pieces."""
    loaded = subject.loaded(preset)
    first, second = (loaded.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False) for _ in range(2))
    expect(first, "generate gives no text")
    expect(first == second, f"greedy decoding gave {first!r}, then {second!r}")
    pieces = "".join(loaded.stream(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False))
    expect(pieces == first, f"stream gives {pieces!r}, generate {first!r}")


@check(real=True)
def stays_close_to_the_dense_model(subject: Subject, preset: str) -> None:
    """On the real model, KL and top-1 agreement on a fixed text are within the preset's floor."""
    from polyquant.measure.quality.divergence import kl_divergence, top1_agreement

    loaded = subject.load(preset, REAL)
    tokens = subject.tokens(loaded)
    reference, candidate = reference_logits(subject.real_model, tokens), loaded.logits(tokens)
    kl = float(kl_divergence(reference, candidate).mean())
    top1 = float(top1_agreement(reference, candidate).float().mean())
    measured = f"KL {kl:.4f} nats, top-1 agreement {top1:.3f} over {len(tokens)} tokens of {subject.real_model}"
    floor = (subject.floors or {}).get(preset)
    suggested = f"Floor(kl={kl * 1.25:.2g}, top1={max(top1 - 0.05, 0):.2f})"
    if subject.floors is None:
        raise NotApplicable(f"no floors are given; measured: {measured}. A floor to promise: {preset!r}: {suggested}")
    if floor is None:
        raise CheckFailed(f"preset {preset} has no floor; measured: {measured}. Add to floors: {preset!r}: {suggested}")
    expect(kl <= floor.kl, f"{measured}; the floor allows KL {floor.kl}")
    expect(top1 >= floor.top1, f"{measured}; the floor asks for top-1 agreement {floor.top1}")
