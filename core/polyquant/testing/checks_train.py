"""Checks of training: adapters learn, the base does not move; what PEFT can do else works, or is refused before it."""

from __future__ import annotations

import hashlib
from math import isfinite
from typing import Any

from polyquant.errors import PolyquantError
from polyquant.loaded import LoadedModel
from polyquant.memory.effective import effective_weight
from polyquant.support.libraries import contained
from polyquant.testing.check import NotApplicable, check, expect
from polyquant.testing.subject import Subject

TARGETS = ["q_proj", "v_proj", "down_proj"]
LEARNING_RATE = 0.1
STRONG = 4  # alpha of adapters that are merged: they change the logits by more than a base of few bits rounds away
MERGED_TOLERANCE = 0.8  # of what the adapter changes in the logits: a base of few bits is rounded again
NORM_TOLERANCE = 0.05  # of a weight's row: kernels round


@check(needs=("trains", "runs_on_torch"))
def adapters_train_on_the_frozen_base(subject: Subject, preset: str) -> None:
    """After one step with LoRA adapters every adapter has a gradient, the loss has moved and the base has not."""
    import torch

    loaded, model = _prepared(subject, preset)
    model = _with_adapters(model)
    model.train()
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    astray = [name for name in trained if "lora_" not in name]
    expect(not astray, f"the base is not frozen: {', '.join(astray[:5])}")
    before = _digests(model)
    ids = torch.tensor([list(subject.tokens(loaded, 24))], device=loaded.model.device)
    started = _two_passes(model, ids)
    _expect_gradients(trained)
    torch.optim.SGD(trained.values(), lr=LEARNING_RATE).step()
    after = _digests(model)
    changed = [name for name, digests in before.items() if digests - after[name]]
    expect(not changed, f"one step changed the base: {', '.join(changed[:5])}")
    with torch.no_grad():
        moved = float(model.eval()(input_ids=ids, labels=ids).loss)
    expect(isfinite(moved) and moved != started, f"the loss was {started:.4f} and is {moved:.4f} after a step")


@check(needs=("trains", "runs_on_torch"))
def a_second_adapter_trains(subject: Subject, preset: str) -> None:
    """A second adapter gets gradients wherever the first one does, and a weighted sum of both is a third that runs."""
    import torch

    loaded, model = _prepared(subject, preset)
    model = _with_adapters(model)
    model.add_adapter("second", _config())
    ids = torch.tensor([list(subject.tokens(loaded, 24))], device=loaded.model.device)
    reached: dict[str, set[str]] = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        model.train()
        _two_passes(model, ids)
        own = {key.replace(f".{name}.", "."): each for key, each in model.named_parameters() if f".{name}." in key}
        reached[name] = set(own).difference(_without_gradients(own))
    still = sorted(reached["default"] - reached["second"])
    expect(not still, f"no gradient reaches the second adapter where the first has one: {', '.join(still[:5])}")
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="linear")
    model.set_adapter("both")
    expect(_logits(model, ids).isfinite().all(), "logits with the sum of two adapters are not finite")


@check(needs=("trains", "runs_on_torch"))
def adapters_merge_or_are_refused(subject: Subject, preset: str) -> None:
    """A model that PEFT merges an adapter into computes what it did before; or it is refused, and nothing changes."""
    import torch

    loaded, model = _prepared(subject, preset)
    ids = torch.tensor([list(subject.tokens(loaded, 24))], device=loaded.model.device)
    base = _logits(model, ids)
    model = _with_adapters(model, lora_alpha=STRONG)
    beside = _logits(model, ids)
    try:
        with contained():
            model.merge_adapter()
    except PolyquantError:
        apart = float((_logits(model, ids) - beside).abs().max())
        expect(apart == 0, f"merging was refused, and yet changed the logits by up to {apart:.4f}")
        return
    effect, apart = (float((each - beside).square().mean().sqrt()) for each in (base, _logits(model, ids)))
    expect(
        apart <= MERGED_TOLERANCE * effect,
        f"the adapter changes the logits by {effect:.4f} (RMS), and merging it by another {apart:.4f}",
    )


@check(needs=("trains", "runs_on_torch"))
def dora_trains_or_is_refused(subject: Subject, preset: str) -> None:
    """DoRA starts from the norms of the weights that the base computes with, and trains; or is refused at once."""
    import torch

    loaded, model = _prepared(subject, preset)
    try:
        model = _with_adapters(model, use_dora=True, init_lora_weights=True)
    except PolyquantError:
        return
    for name, layer in model.named_modules():
        if not name.endswith(TARGETS[0]):
            continue
        base = layer.get_base_layer()
        norms = effective_weight(base, base.in_features).norm(dim=1)
        magnitudes = layer.lora_magnitude_vector["default"].weight.detach().float().cpu()
        apart = float(((magnitudes - norms).abs() / norms).max())
        expect(apart <= NORM_TOLERANCE, f"{name}: DoRA's magnitudes are up to {apart:.0%} off the weight's norms")
    model.train()
    ids = torch.tensor([list(subject.tokens(loaded, 24))], device=loaded.model.device)
    _two_passes(model, ids)
    _expect_gradients({name: tensor for name, tensor in model.named_parameters() if "lora_B" in name})


def _prepared(subject: Subject, preset: str) -> tuple[LoadedModel, Any]:
    """What was loaded, and the model as the hook gives it for training."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise NotApplicable("peft is not installed (pip install peft)") from None
    loaded = subject.load(preset)
    loaded.logits(subject.tokens(loaded, 8))  # some kernels repack weights in it, and then pass no gradient
    return loaded, subject.handle.prepare_for_training(loaded)


def _config(**more: Any) -> Any:
    import peft

    return peft.LoraConfig(
        **{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, "task_type": "CAUSAL_LM", **more}
    )


def _with_adapters(model: Any, **more: Any) -> Any:
    import peft
    import torch

    with torch.random.fork_rng(devices=[]), contained():
        torch.manual_seed(0)
        return peft.get_peft_model(model, _config(**more))


def _two_passes(model: Any, ids: Any) -> float:
    """Two forward passes, a backward pass of the second; returns its loss."""
    model(input_ids=ids, labels=ids)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach())


def _without_gradients(trained: dict[str, Any]) -> list[str]:
    return [name for name, tensor in trained.items() if tensor.grad is None or not tensor.grad.abs().sum() > 0]


def _expect_gradients(trained: dict[str, Any]) -> None:
    still = _without_gradients(trained)
    expect(trained and not still, f"no gradient reaches {', '.join(still[:5]) or 'any adapter'}")


def _logits(model: Any, ids: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float().cpu()


def _digests(model: Any) -> dict[str, set[str]]:
    """Hashes of the tensors of each module outside the adapters; a library may move a tensor within its module."""
    import torch

    from polyquant.memory import storage

    digests: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        own = digests.setdefault(name, set())
        for _, tensor in storage._module_tensors(module) if "lora_" not in name else ():
            data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
            own.add(hashlib.sha256(data).hexdigest())
    return digests
