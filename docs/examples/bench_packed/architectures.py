"""Tokens a second of architectures whose steps the kernels do not make as a whole: packed NF4 against dense float32.

Random weights, about a hundred million: see `sources.RANDOM`. A bare loop of the model with its cache, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import Any

from polyquant.loading.dense import as_loaded, load_dense
from polyquant.models.resolve import resolve_dense

from bench_packed.cells import Asked, Cell, Figures, Sizes, Source, first_tokens, greedy, load_packed, run
from bench_packed.presets import NF4, LeftOut, Preset, nf4_of_models
from bench_packed.sources import made

ARCHITECTURES = ("gpt2", "gpt-neox", "opt", "phi", "stablelm")
FIGURES = {"decoded": "decoded, tokens/s", "kernel": "kernel"}
COMPARED, RATIO = ("decoded",), "ratio: to the same model, dense"


def cells(asked: Asked) -> Iterator[Cell | LeftOut]:
    def of(model: Source, nf4: Preset) -> Iterator[Cell]:
        dense = f"{model.model} dense:float32"
        yield Cell(name=dense, source=model, sizes=asked.sizes, job={})
        yield Cell(
            name=f"{model.model} {NF4}", source=model, sizes=asked.sizes, against=dense,
            job={"backend": nf4.backend, "options": nf4.options},
        )  # fmt: skip

    return nf4_of_models(ARCHITECTURES, asked, of)


def measure(source: Source, sizes: Sizes, backend: str = "", options: Mapping[str, Any] | None = None) -> Figures:
    """backend: empty for the dense model."""
    path = made(source)
    if backend:
        loaded = load_packed(path, backend, **(options or {}))
    else:
        dense = resolve_dense(path)
        loaded = as_loaded(load_dense(dense), dense, "float32")
    decoded = greedy(loaded.model, first_tokens(loaded, sizes.prompt_tokens))
    next(decoded)  # the prompt
    next(decoded)  # and a step, to get warm
    started = perf_counter()
    for _ in range(sizes.new_tokens):
        next(decoded)
    return {"decoded": sizes.new_tokens / (perf_counter() - started), "kernel": loaded.kernel}


if __name__ == "__main__":
    run(measure)
