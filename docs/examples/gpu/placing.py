"""The steps `auto@SIZE` and `budget@SIZE`: where a model goes, by itself and within a budget smaller than it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import common
import polyquant
from polyquant.errors import PlacementError

BACKEND, PRESET = "bitsandbytes", "nf4"
BUDGET_BYTES = 6 * 2**30
SHARE = 0.6  # of the planned weights, for a model that is smaller than the budget


def measure(arguments: common.Facts, note: common.Note) -> None:
    options = dict(polyquant.backend(BACKEND).info.presets[PRESET])
    model, device = Path(arguments["model"]), arguments["device"]
    note({"candidate": f"{BACKEND}:{PRESET}"})
    if arguments["way"] == "auto":
        look(polyquant.load(model, BACKEND, device=device, device_map="auto", **options), arguments, note)
        return
    planned = polyquant.plan(model, BACKEND, device=device, **options).weights_planned_bytes
    budget = min(BUDGET_BYTES, int(SHARE * planned))
    note({"planned_bytes": planned, "budget_bytes": budget, "refused": refusal(model, device, budget, options)})
    if device == "cpu":
        return  # there is no slower device to spill to: the refusal is all there is to see
    room = {**room_on(device, budget), "cpu": 4 * planned}
    settings: dict[str, Any] = {"max_memory": room, "offload": "cpu", **options}
    loaded = polyquant.load(model, BACKEND, device=device, **settings)
    look(loaded, arguments, note)


def refusal(model: Path, device: str, budget: int, options: common.Facts) -> str:
    """How the load is refused where nothing may spill. Raises RuntimeError where it is not."""
    try:
        polyquant.load(model, BACKEND, device=device, max_memory=room_on(device, budget), **options)
    except PlacementError as error:
        return str(error)
    raise RuntimeError(f"a load that needs more than its budget of {budget} bytes was not refused")


def room_on(device: str, budget: int) -> dict[int | str, int]:
    """The budget as `max_memory` takes it: of the card that `device` names, the first where it names none."""
    kind, _, index = device.partition(":")
    return {"cpu" if kind == "cpu" else int(index or 0): budget}


def look(loaded: Any, arguments: common.Facts, note: common.Note) -> None:
    """Where the weights are, whether all is well, how far it is from the dense model, and how fast it is."""
    report = polyquant.verify(loaded)
    where: Counter[str] = Counter()
    for layer in report.layers:
        where[layer.device] += layer.stored_bytes
    note({
        "bytes_on": dict(where), "load_seconds": report.load_seconds, "notes": report.notes,
        "load_peak_bytes": report.memory.load_peak_bytes, "run_peak_bytes": report.memory.run_peak_bytes,
        "failed_checks": [str(check) for check in report.failures],
    })  # fmt: skip
    note(common.far_from_dense(loaded, Path(arguments["model"]), arguments["device"]))
    note({"tg": report.sample.tokens_per_second})


if __name__ == "__main__":
    common.step(measure)
