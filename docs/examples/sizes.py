"""Plans of well-known models for the docs' table of memory by model size: from configs alone, nothing is downloaded.

python docs/examples/sizes.py [MODEL ...]

The figures go to docs/reference/sizes.json, beside those of models that are not planned this time; then
`python docs/generate.py` renews the page. A model is a file of tests/configs/, by its name without `.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import polyquant
from polyquant.errors import PolyquantError

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "tests" / "configs"
SIZES = ROOT / "docs" / "reference" / "sizes.json"
CANDIDATES: dict[str, dict[str, Any]] = {
    "bitsandbytes:int8": {"bits": 8},
    "gguf:Q5_0": {"type": "Q5_0"},
    "bitsandbytes:nf4-dq": {"bits": 4, "quant_type": "nf4", "double_quant": True},
    "mlx:int4": {"bits": 4},
    "hqq:int3": {"bits": 3},
}
ON_A_GPU = {
    "devices": "cuda:0=64TiB",
    "kernel": "library",
}  # it need not be there; what a CPU's process takes is not in
CONTEXT = 8192  # tokens


def main() -> None:
    kept = msgspec.json.decode(SIZES.read_bytes()) if SIZES.exists() else {}
    for name in sys.argv[1:] or [path.stem for path in CONFIGS.glob("*.json")]:
        kept[name] = sizes(name)
        print(f"{name}: {kept[name]['dense_bytes'] / 2e9:.2f} billion parameters", flush=True)
    there = {path.stem for path in CONFIGS.glob("*.json")}
    kept = {name: row for name, row in kept.items() if name in there}
    ordered = dict(sorted(kept.items(), key=lambda item: item[1]["dense_bytes"]))
    SIZES.write_bytes(msgspec.json.format(msgspec.json.encode(ordered), indent=1) + b"\n")


def sizes(name: str) -> dict[str, Any]:
    """Bytes of one model: dense in bfloat16, its key-value cache, and with each candidate, or why not."""
    rows: dict[str, Any] = {}
    for candidate, options in CANDIDATES.items():
        backend = candidate.partition(":")[0]
        try:
            plan = polyquant.plan(CONFIGS / f"{name}.json", backend, context=CONTEXT, **ON_A_GPU, **options)
        except PolyquantError as error:
            rows[candidate] = {"refused": str(error).partition("\n")[0]}
            continue
        rows[candidate] = {"weights_bytes": plan.weights_planned_bytes, "needed_bytes": plan.needed_bytes}
        dense, cache = plan.weights_dense_bytes, plan.kv_cache_bytes
    return {"dense_bytes": dense, "kv_cache_bytes": cache, "candidates": rows}


if __name__ == "__main__":
    main()
