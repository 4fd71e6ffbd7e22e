"""The same candidates on two machines: run it on each with a folder of its own, then once more with both folders.

python docs/examples/two_machines.py measure MODEL FOLDER CANDIDATE [CANDIDATE ...]
python docs/examples/two_machines.py show FOLDER OTHER_FOLDER REPORT.html
"""

from __future__ import annotations

import sys

import polyquant


def main() -> None:
    step, *arguments = sys.argv[1:]
    if step == "measure":
        model, folder, *candidates = arguments
        comparison = polyquant.compare(model, candidates, out=folder, windows=4)
        print(f"{len(comparison.done)} of {len(comparison.rows)} measured on {comparison.machine.processor}")
        return
    here, there, page = arguments
    found = polyquant.difference(here, there)
    for change in found.changed:
        print(f"{change.candidate}: {change.figure} {change.before:g} -> {change.after:g}")
    print(f"report: {found.report(page)}")


if __name__ == "__main__":
    main()
