"""Fine-tuning of the real model in NF4: what it promises, proven by real runs that are really killed."""

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import polyquant
import pytest
from polyquant.finetuning.options import Tuned

pytestmark = [pytest.mark.real, pytest.mark.slow]
MODEL, DATA = "builtin:smollm2", Path(__file__).parent.parent / "docs" / "examples" / "captain.jsonl"
STEPS = 12


def command(out):
    return [
        sys.executable, "-m", "polyquant", "finetune", MODEL, "--backend", "bitsandbytes", "--bits", "4", "--device", "cpu",
        "--data", str(DATA), "--out", str(out), "--steps", str(STEPS), "--checkpoint-every", "2", "--batch-size", "1",
        "--learning-rate", "2e-3", "--dropout", "0.1",
    ]  # fmt: skip


def killed(out, progress, seconds):
    """Start the run, wait until it says that it has gone further than `progress` steps, kill it `seconds` later.

    Gives the steps it got to.
    """
    with subprocess.Popen(command(out), stderr=subprocess.PIPE, text=True) as running:
        try:
            for line in running.stderr:
                found = re.match(r"step (\d+)/", line)
                if found and int(found[1]) > progress:
                    time.sleep(seconds)
                    running.send_signal(signal.SIGKILL)
                    break
            rest = running.stderr.read()
            assert running.wait(timeout=60) == -signal.SIGKILL, rest
        finally:
            running.kill()
    last = re.findall(r"step (\d+)/", rest)
    return int(last[-1]) if last else int(found[1])


def finished(out):
    ended = subprocess.run([*command(out), "--json"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return msgspec.json.decode(ended.stdout, type=Tuned)


def test_killed_at_three_random_moments_it_ends_as_if_it_had_not_been(tmp_path):
    seed = int(os.environ.get("KILL_SEED", time.time()))
    chance, got_to = random.Random(seed), []
    for _ in range(3):
        progress = (got_to[-1] if got_to else 0) + chance.choice((0, 1, 2))
        got_to.append(killed(tmp_path / "killed", min(progress, STEPS - 2), chance.uniform(0, 3)))
    assert not (tmp_path / "killed").exists()
    gone_on, whole = finished(tmp_path / "killed"), finished(tmp_path / "whole")
    print(f"seed {seed}: killed after steps {got_to}, gone on from step {gone_on.resumed_from}: loss "
          f"{gone_on.last_loss!r}; uninterrupted: {whole.last_loss!r}")  # fmt: skip
    assert gone_on.resumed_from > 0
    assert (gone_on.steps, whole.steps, whole.resumed_from) == (STEPS, STEPS, 0)
    assert gone_on.last_loss == pytest.approx(whole.last_loss, rel=1e-5)
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def losses(adapter):
    return [float(row.split(",")[1]) for row in (adapter / "steps.csv").read_text().splitlines()[1:]]


def test_the_base_is_unchanged_bit_for_bit(tmp_path):
    """Every byte that is stored: the model as it was loaded, after training, and loaded once more.

    No forward pass without gradients comes in between: bitsandbytes repacks 4-bit weights in it on some CPUs.
    """
    loaded = polyquant.load(MODEL, "bitsandbytes", device="cpu", bits=4, quant_type="nf4")
    before = digests(loaded.model)
    assert len(before) == 30 * 9 + 4, "7 linear layers and 2 norms a block; embedding, last norm, rotary table, head"
    tuned = polyquant.finetune(
        loaded, DATA, tmp_path / "adapter", steps=3, batch_size=1, learning_rate=2e-3, warmup=0.0
    )
    assert tuned.last_loss != tuned.first_loss
    with loaded.model.disable_adapter():
        assert digests(loaded.model.get_base_model()) == before
    del loaded
    assert digests(polyquant.load(MODEL, "bitsandbytes", device="cpu", bits=4, quant_type="nf4").model) == before
    print(f"{len(before)} modules, sha256 of all {together(before)}, the same before and after {tuned.steps} steps")


def digests(model):
    """SHA-256 of the stored tensors of each module of the base that has any, whatever attribute holds them."""
    import torch
    from polyquant.memory import storage

    found = {}
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        tensors = [tensor for _, tensor in storage._module_tensors(module)]
        if tensors:
            parts = sorted(
                hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
                for tensor in tensors
            )
            found[name.removesuffix(".base_layer")] = parts
    return found


def together(digests):
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:16]
