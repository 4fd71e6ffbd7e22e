"""Picks the best candidate that fits a budget, by what was measured on this machine.

python docs/examples/best_under.py MODEL BUDGET CANDIDATE [CANDIDATE ...]    for example: builtin:smollm2 6GiB gguf:Q8_0
"""

from __future__ import annotations

import sys

import polyquant
from polyquant.errors import PolyquantError


def main() -> None:
    model, budget, *candidates = sys.argv[1:]
    comparison = polyquant.compare(model, candidates, parts=("quality",), device="cpu", windows=4)
    try:
        row = comparison.best("quality", memory=budget)
    except PolyquantError as error:
        sys.exit(str(error))
    print(f"best under {budget}: {row.candidate.name}")
    print(row.command)


if __name__ == "__main__":
    main()
