"""The public functions `compare` and `read_comparison`. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyquant.comparison.candidates import Candidate
    from polyquant.comparison.records import Comparison
    from polyquant.comparison.run import Watcher


def compare(
    model: str | Path,
    candidates: Sequence[str | Candidate],
    *,
    out: str | Path | None = None,
    watcher: Watcher | None = None,
    **options: Any,
) -> Comparison:
    """Measure candidates on `model`: quality against the dense model, speed, and every kind of memory.

    candidates: `bitsandbytes:nf4,double_quant=true`, `gguf:Q4_K_M`, `gptq@folder`, `dense:bfloat16`; each is measured
        in a process of its own. One that fails is a row with its reason.
    out: folder that keeps finished cells; what is there is not measured again, so that a run that was killed goes on.
        None: one in the cache, for each model.
    options: `polyquant.comparison.options.CompareOptions`.

    >>> comparison = polyquant.compare("builtin:smollm2", ["bitsandbytes:nf4", "gguf:Q8_0"])
    >>> comparison.best(memory="6GiB").candidate.name, comparison.report("report.html")
    """
    from polyquant.comparison.options import CompareOptions
    from polyquant.comparison.run import compare as run
    from polyquant.options import convert

    return run(model, candidates, Path(out) if out else None, convert(CompareOptions, options), watcher)


def read_comparison(path: str | Path) -> Comparison:
    """The comparison that lies in a folder or a comparison.json. Raises ConfigError where none does."""
    from polyquant.comparison.run import read_comparison as read

    return read(path)
