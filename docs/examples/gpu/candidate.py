"""The step `BACKEND:PRESET@SIZE`: plan, load, verify, compare with the dense model, time."""

from __future__ import annotations

from pathlib import Path

import common
import polyquant

CONTEXT = 32  # tokens; about what a verification runs


def measure(arguments: common.Facts, note: common.Note) -> None:
    backend, preset = arguments["candidate"].split(":")
    info, device = polyquant.backend(backend).info, arguments["device"]
    model, options = Path(arguments["model"]), dict(info.presets[preset])
    source = model
    if not info.capabilities.on_the_fly:
        source, options = Path(arguments["checkpoint"]), {}
        if not (source / "config.json").exists():
            raise common.NotRun("its checkpoint is not there: the step that makes it did not finish")
    planned = polyquant.plan(source, backend, device=device, context=CONTEXT, **options)
    note({
        "planned_bytes": planned.weights_planned_bytes, "load_peak_planned_bytes": planned.load_peak_bytes,
        "run_peak_planned_bytes": planned.run_peak_bytes,
    })  # fmt: skip
    loaded = polyquant.load(source, backend, device=device, **options)
    report = polyquant.verify(loaded)
    memory = report.memory
    note({
        "load_seconds": report.load_seconds, "kernel": report.kernel, "compute_dtype": report.compute_dtype,
        "runs_on": report.device, "stored_bytes": memory.weights_stored_bytes,
        "bits_per_weight": memory.quantized_bits_per_weight, "load_peak_bytes": memory.load_peak_bytes,
        "run_peak_bytes": memory.run_peak_bytes, "notes": report.notes,
        "failed_checks": [str(check) for check in report.failures],
    })  # fmt: skip
    note(common.far_from_dense(loaded, model, device))
    note(common.speed_of(loaded.session, len(loaded.tokenizer), small=arguments["small"]))


if __name__ == "__main__":
    common.step(measure)
