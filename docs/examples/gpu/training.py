"""The step `qlora@SIZE`: LoRA on the NF4 base, steps a second, and its peak against what can be planned of it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import common
import polyquant

BACKEND, PRESET = "bitsandbytes", "nf4"
ADAPTER_BYTES = 4 + 4 + 8  # of each trained weight: itself, its gradient, and Adam's two moments, float32


def measure(arguments: common.Facts, note: common.Note) -> None:
    small, device, model = arguments["small"], arguments["device"], Path(arguments["model"])
    data, out = Path(arguments["work"]) / "train.jsonl", Path(arguments["work"]) / "adapter"
    lines = [json.dumps({"text": text}) for text in common.text_to_train_on()] * 20
    data.write_text("\n".join(lines), encoding="utf-8")
    options = dict(polyquant.backend(BACKEND).info.presets[PRESET])
    length, steps = (64, 3) if small else (512, 12)
    planned = polyquant.plan(model, BACKEND, device=device, context=length, **options)
    note({"candidate": f"{BACKEND}:{PRESET}", "tokens_a_step": length, "steps": steps,
          "planned_bytes": planned.weights_planned_bytes})  # fmt: skip
    ends: list[float] = []
    tuned = polyquant.finetune(
        model, data, out, backend=BACKEND, device=device, overwrite=True, restart=True, steps=steps, batch_size=1,
        max_length=length, packing=True, completion_only=False, warmup=0.0, checkpoint_every=steps,
        progress=SimpleNamespace(step=lambda _: ends.append(perf_counter())), **options,
    )  # fmt: skip
    intervals = sorted(later - earlier for earlier, later in pairwise(ends))
    note({
        "first_loss": tuned.first_loss, "last_loss": tuned.last_loss, "peak_bytes": tuned.peak_bytes,
        "trained_parameters": tuned.trained_parameters,
        "peak_planned_bytes": planned.process_bytes + planned.weights_planned_bytes
        + ADAPTER_BYTES * tuned.trained_parameters,
        "steps_per_second": 1 / intervals[len(intervals) // 2] if intervals else None, "notes": list(tuned.notes),
    })  # fmt: skip


if __name__ == "__main__":
    common.step(measure)
