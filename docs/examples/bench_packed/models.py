"""Tokens a second of models of about a billion weights: NF4 packed, against llama.cpp's Q4_0 of the same checkpoint.

Random weights in bfloat16, with SmolLM2's tokenizer and its vocabulary of 49152 tokens: see `sources.RANDOM`.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench_packed.cells import Asked, Cell, Source, run
from bench_packed.presets import NF4, LeftOut, Preset, nf4_of_models
from bench_packed.sources import LLAMA_CPP
from bench_packed.speed import COMPARED, FIGURES, llama_cpp, measure, packed_options

__all__ = ["COMPARED", "FIGURES", "RATIO", "cells"]
MODELS = ("llama-1b", "qwen3-1b")
RATIO = "ratio: to llama.cpp's Q4_0 of the same model"


def cells(asked: Asked) -> Iterator[Cell | LeftOut]:
    def of(model: Source, nf4: Preset) -> Iterator[Cell]:
        theirs = llama_cpp(model, "Q4_0", asked, f"{model.model} {LLAMA_CPP}:Q4_0")
        yield theirs
        yield Cell(
            name=f"{model.model} {NF4}", source=model, sizes=asked.sizes, against=theirs.name,
            job={"backend": nf4.backend, "options": packed_options(nf4.options, asked)},
        )  # fmt: skip

    return nf4_of_models(MODELS, asked, of)


if __name__ == "__main__":
    run(measure)
