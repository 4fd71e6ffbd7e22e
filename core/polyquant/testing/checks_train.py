"""Check of training: adapters learn, the base does not move."""

from __future__ import annotations

import hashlib
from math import isfinite
from typing import Any

from polyquant.support.libraries import contained
from polyquant.testing.check import NotApplicable, check, expect
from polyquant.testing.subject import Subject

TARGETS = ["q_proj", "v_proj", "down_proj"]
LEARNING_RATE = 0.1


@check(needs=("trains", "runs_on_torch"))
def adapters_train_on_the_frozen_base(subject: Subject, preset: str) -> None:
    """After one step with LoRA adapters every adapter has a gradient, the loss has moved and the base has not."""
    import torch

    try:
        import peft
    except ImportError:
        raise NotApplicable("peft is not installed (pip install peft)") from None
    loaded = subject.load(preset)
    loaded.logits(subject.tokens(loaded, 8))  # some kernels repack weights in it, and then pass no gradient
    model = subject.handle.prepare_for_training(loaded)
    with torch.random.fork_rng(devices=[]), contained():
        torch.manual_seed(0)
        adapters = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, adapters)
    model.train()
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    astray = [name for name in trained if "lora_" not in name]
    expect(not astray, f"the base is not frozen: {', '.join(astray[:5])}")
    before = _digests(model)
    ids = torch.tensor([list(subject.tokens(loaded, 24))], device=loaded.model.device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    still = [name for name, tensor in trained.items() if tensor.grad is None or not tensor.grad.abs().sum() > 0]
    expect(trained and not still, f"no gradient reaches {', '.join(still[:5]) or 'any adapter'}")
    torch.optim.SGD(trained.values(), lr=LEARNING_RATE).step()
    after = _digests(model)
    changed = [name for name, digests in before.items() if digests - after[name]]
    expect(not changed, f"one step changed the base: {', '.join(changed[:5])}")
    with torch.no_grad():
        moved = float(model.eval()(input_ids=ids, labels=ids).loss)
    started = float(loss.detach())
    expect(isfinite(moved) and moved != started, f"the loss was {started:.4f} and is {moved:.4f} after a step")


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
