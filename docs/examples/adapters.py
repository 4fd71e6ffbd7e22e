"""One adapter, trained on one backend's base, put on others: how far is each from the base it was trained on?

python docs/examples/adapters.py [--adapter DIR] [--checkpoints DIR]

Trains 30 steps on captain.jsonl with bitsandbytes NF4, unless DIR holds an adapter already. KL and top-1 against base
and adapter on the text that comes with polyquant (2 windows of llamacpp-512, 510 positions), and beside them those of
the bases alone, which differ whatever is put on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import polyquant
import torch
from peft import PeftModel
from polyquant.measure.quality.metrics import Tally
from polyquant.measure.quality.stored import scored
from polyquant.measure.quality.windows import Window, cut, preset_named
from polyquant.models.generation import logits_of, stream
from polyquant.models.hf import load_dense, load_tokenizer
from polyquant.models.resolve import resolve_dense
from polyquant.support.texts import evaluation_text

MODEL, DATA = "builtin:smollm2", Path(__file__).parent / "captain.jsonl"
TRAINED = ("bitsandbytes", {"bits": 4, "quant_type": "nf4"})
OTHERS = {"hqq": {"bits": 4, "group_size": 64}, "torchao": {"weights": "int8"}, "quanto": {"weights": "int8"}}
CHECKPOINTS = ("gptq-int4",)  # of the same model, as measure.py leaves them
QUESTION = [{"role": "user", "content": "What is the capital of Spain?"}]  # not in the data
LENGTH = {"max_new_tokens": 32, "do_sample": False}
WINDOWS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, default=Path("adapter"))
    parser.add_argument("--checkpoints", type=Path)
    arguments = parser.parse_args()
    backend, options = TRAINED
    if not arguments.adapter.exists():
        tuned = polyquant.finetune(
            MODEL, DATA, arguments.adapter, backend=backend, device="cpu", steps=30, learning_rate=2e-3, **options
        )
        losses = f"loss {tuned.first_loss:.3f} -> {tuned.last_loss:.3f}"
        print(f"{tuned.steps} steps in {tuned.seconds:.0f} s, {losses}, adapter {tuned.adapter_bytes / 1e6:.1f} MB")
    adapter = str(arguments.adapter)
    loaded = polyquant.load(MODEL, backend, device="cpu", adapter=adapter, **options)
    windows = cut(
        loaded.tokenizer(evaluation_text(), add_special_tokens=False).input_ids, preset_named("llamacpp-512"),
        bos=loaded.tokenizer.bos_token_id, limit=WINDOWS,
    )  # fmt: skip
    tuned_reference, base_reference = logits(loaded.model, windows)
    print("| backend | KL, with adapter | top-1 | KL, bases alone | top-1 | answers |\n|---|---|---|---|---|---|")
    print(f"| {backend} {shown(options)} (trained on it) | 0 | 100 % | 0 | 100 % | {answer(loaded)} |")
    del loaded
    for name, model, said in candidates(adapter, arguments.checkpoints):
        with_adapter, base = logits(model, windows)
        cells = [*far(tuned_reference, with_adapter, windows), *far(base_reference, base, windows)]
        print(f"| {name} | {' | '.join(cells)} | {said} |", flush=True)


def candidates(adapter: str, checkpoints: Path | None) -> Any:
    """(name, PEFT's model, its answer): the dense model through PEFT alone, then other backends through polyquant."""
    source = resolve_dense(MODEL)
    dense = PeftModel.from_pretrained(load_dense(source), adapter, trust_remote_code=False).eval()
    yield "dense float32, PEFT alone", dense, "".join(stream(dense, load_tokenizer(source), QUESTION, LENGTH)).strip()
    del dense
    for backend, options in OTHERS.items():
        loaded = polyquant.load(MODEL, backend, device="cpu", adapter=adapter, **options)
        yield f"{backend} {shown(options)}", loaded.model, answer(loaded)
    for name in CHECKPOINTS if checkpoints else ():
        loaded = polyquant.load(checkpoints / name, device="cpu", adapter=adapter)
        yield f"{name}, a checkpoint", loaded.model, answer(loaded)


def answer(loaded: Any) -> str:
    return loaded.generate(QUESTION, **LENGTH).strip().replace("\n", " ")


def logits(model: Any, windows: list[Window]) -> tuple[list[Any], list[Any]]:
    """Logits of the scored positions of each window, with the adapter and without it."""
    with_adapter = [scored(logits_of(model, window.tokens), window) for window in windows]
    with model.disable_adapter():
        return with_adapter, [scored(logits_of(model, window.tokens), window) for window in windows]


def far(reference: list[Any], candidate: list[Any], windows: list[Window]) -> list[str]:
    """Mean KL(reference || candidate) in nats with its standard error, and how often both put the same token first."""
    tally = Tally()
    for window, wanted, given in zip(windows, reference, candidate, strict=True):
        tally.add(wanted.log_softmax(-1), given, torch.tensor(window.tokens[window.first_scored :]))
    quality = tally.result("llamacpp-512", storage_error=0.0)
    return [f"{quality.kl_mean:.4f} ± {quality.kl_standard_error:.4f}", f"{quality.top1:.1%}"]


def shown(options: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


if __name__ == "__main__":
    main()
