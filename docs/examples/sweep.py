"""Sweeps the group sizes of one backend: what a smaller group costs in bytes, and what it gives in quality.

python docs/examples/sweep.py MODEL BACKEND:PRESET SIZE [SIZE ...]    for example: builtin:smollm2 hqq:int4 32 64 128
"""

from __future__ import annotations

import sys

import polyquant


def main() -> None:
    model, candidate, *sizes = sys.argv[1:]
    separator = "," if ":" in candidate else ":"
    candidates = [f"{candidate}{separator}group_size={size}" for size in sizes]
    comparison = polyquant.compare(model, candidates, parts=("quality",), device="cpu", windows=4)
    print(f"{'group size':>10} {'bits a weight':>14} {'KL, nats':>10} {'±':>8}")
    for size, row in zip(sizes, comparison.rows, strict=True):
        result = row.result
        if result is None or result.quality is None or result.bits_per_weight is None:
            print(f"{size:>10} {result.reason.splitlines()[0] if result else ''}")
            continue
        quality = result.quality
        figures = f"{result.bits_per_weight:>14.2f} {quality.kl_mean:>10.4f} {quality.kl_standard_error:>8.4f}"
        print(f"{size:>10} {figures}")


if __name__ == "__main__":
    main()
