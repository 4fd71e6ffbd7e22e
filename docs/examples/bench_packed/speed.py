"""Tokens a second of every packed preset of 4 and 8 bits, against llama.cpp with as many."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import polyquant
from polyquant.measure.speed import measure_speed
from polyquant.packable import PACKED
from polyquant.plugin import encode_prompt
from polyquant.support.texts import evaluation_text

from bench_packed.cells import REAL, Asked, Cell, Figures, Sizes, Source, run
from bench_packed.presets import LeftOut, packed_presets
from bench_packed.sources import LLAMA_CPP, made

LIMIT_SECONDS = 5.0  # of prompts and of generations: fewer repetitions where a model is slow
FIGURES = {
    "generated": "generate, tokens/s",
    "decoded": "decoded as compare does, tokens/s",
    "prompt": "prompt, tokens/s",
    "kernel": "kernel",
}
COMPARED, RATIO = ("generated", "decoded", "prompt"), "ratio: to llama.cpp's Q4_0, of presets of 8 bits to its Q8_0"
LLAMA_CPP_TYPES = {4: "Q4_0", 8: "Q8_0"}  # bits -> what presets of so many are compared with


def cells(asked: Asked) -> Iterator[Cell | LeftOut]:
    for preset in LLAMA_CPP_TYPES.values():
        yield llama_cpp(Source(model=REAL), preset, asked)
    for preset in packed_presets():
        yield preset if isinstance(preset, LeftOut) else Cell(
            name=preset.name, source=preset.source, sizes=asked.sizes,
            job={"backend": preset.backend, "options": packed_options(preset.options, asked)},
            against=f"{LLAMA_CPP}:{LLAMA_CPP_TYPES[preset.bits]}",
        )  # fmt: skip


def llama_cpp(model: Source, preset: str, asked: Asked, name: str = "") -> Cell:
    """llama.cpp on a file that it has quantized itself."""
    source = Source(model=model.model, backend=LLAMA_CPP, preset=preset, small=model.small)
    job = {"backend": LLAMA_CPP, "options": {}}
    return Cell(name=name or f"{LLAMA_CPP}:{preset}", source=source, sizes=asked.sizes, job=job)


def packed_options(options: Any, asked: Asked) -> dict[str, Any]:
    return {**options, "kernel": PACKED, "compute_dtype": "float32", "embeddings": asked.embeddings}


def measure(source: Source, sizes: Sizes, backend: str, options: dict[str, Any]) -> Figures:
    """A warm-up, the whole of `generate` with its sampling and decoding of text, and the model alone."""
    loaded = polyquant.load(made(source), backend, device="cpu", **options)
    prompt = text_of(loaded.tokenizer, sizes.prompt_tokens)

    def generate(tokens: int) -> float:
        started = perf_counter()  # as many as are asked for: at first the end of a text is no choice
        loaded.generate(prompt, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
        return perf_counter() - started

    generate(2)
    seconds = generate(sizes.new_tokens)
    speed = measure_speed(
        loaded.session, loaded.vocabulary, prompt_tokens=sizes.long_prompt_tokens, generated_tokens=sizes.new_tokens,
        limit_seconds=LIMIT_SECONDS,
    )  # fmt: skip
    return {
        "generated": sizes.new_tokens / seconds,
        "decoded": speed.generated_tokens_per_second.mean,
        "prompt": speed.prompt_tokens_per_second.mean,
        "kernel": loaded.kernel,
    }


def text_of(tokenizer: Any, tokens: int) -> str:
    """The beginning of the evaluation text that is so many tokens."""
    text = evaluation_text()
    return next(text[:end] for end in range(1, len(text)) if len(encode_prompt(tokenizer, text[:end])) == tokens)


if __name__ == "__main__":
    run(measure)
