"""Sweeps the group sizes of several backends: what a smaller group costs in bytes, and what it gives in quality.

python docs/examples/sweep.py MODEL SIZE,SIZE CANDIDATE [CANDIDATE ...]    e.g. builtin:smollm2 32,64 hqq:int4 mlx:int4
"""

from __future__ import annotations

import sys

import polyquant


def main() -> None:
    model, sizes, *candidates = sys.argv[1:]
    sweep = {"group_size": sizes.split(",")}
    comparison = polyquant.compare(model, candidates, sweep=sweep, parts=("quality",), device="cpu", windows=4)
    print(f"{'bits a weight':>14} {'KL, nats':>10} {'±':>8}  candidate")
    for row in comparison.rows:
        result = row.result
        if result is None or result.quality is None or result.bits_per_weight is None:
            print(f"{row.candidate.name}: {row.reason.splitlines()[0]}")
            continue
        quality = result.quality
        figures = f"{result.bits_per_weight:>14.2f} {quality.kl_mean:>10.4f} {quality.kl_standard_error:>8.4f}"
        print(f"{figures}  {row.candidate.name}")


if __name__ == "__main__":
    main()
