"""How far the packed kernels are from the library's product with the same weights: nothing but rounding should differ.

Both compute in float32, where the library does; embeddings are kept. The packed model gets the text at once, as a
prompt, whose weights are decoded and multiplied by torch, and token by token, as it generates: there the kernels round
activations to 16-bit integers. The library gets it at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from bench_packed.cells import (
    Asked,
    Cell,
    Figures,
    Sizes,
    Source,
    first_tokens,
    greedy,
    load_packed,
    load_with_library,
    one_by_one,
    run,
)
from bench_packed.presets import LeftOut, packed_presets
from bench_packed.sources import made

FIGURES = {
    "prompt_kl": "KL of a prompt, nats",
    "steps_kl": "KL of steps, nats",
    "steps_kl_max": "its largest",
    "tokens": "greedy tokens",
    "library_in": "the library in",
}
COMPARED = ()
ROUNDS = 1  # nothing is timed
CHUNK = 64  # positions in float64 at a time


def cells(asked: Asked) -> Iterator[Cell | LeftOut]:
    for preset in packed_presets():
        yield preset if isinstance(preset, LeftOut) else Cell(
            name=preset.name, source=preset.source, sizes=asked.sizes,
            job={"backend": preset.backend, "options": preset.options},
        )  # fmt: skip


def measure(source: Source, sizes: Sizes, backend: str, options: dict[str, Any]) -> Figures:
    import torch

    path = made(source)
    packed, library = load_packed(path, backend, **options), load_with_library(path, backend, **options)
    tokens = first_tokens(library, sizes.compared_positions)
    expected = library.logits(tokens)
    prompt = kl_divergence(expected, packed.logits(tokens))
    steps = kl_divergence(expected, torch.stack(list(one_by_one(packed.model, tokens))))
    return {
        "prompt_kl": float(prompt.mean()),
        "steps_kl": float(steps.mean()),
        "steps_kl_max": float(steps.max()),
        "positions": len(steps),
        "library_in": str(library.config.compute_dtype),
        **parting(library.model, packed.model, tokens[: sizes.prompt_tokens], sizes.compared_tokens),
    }


def kl_divergence(reference: Any, candidate: Any) -> Any:
    """KL(reference || candidate) of each position in nats, in float64 over the whole vocabulary: (positions,)."""
    import torch

    parts = []
    for one, other in zip(reference.split(CHUNK), candidate.split(CHUNK), strict=True):
        expected, found = (torch.log_softmax(logits.double(), dim=-1) for logits in (one, other))
        parts.append((expected.exp() * (expected - found)).sum(dim=-1))
    return torch.cat(parts)


def parting(library: Any, packed: Any, prompt: list[int], count: int) -> Figures:
    """Whether both write the same tokens; else where they part, and by how much the library prefers its own there."""
    ours = [token for token, _ in islice(greedy(packed, prompt), count)]
    for position, (token, logits) in enumerate(islice(greedy(library, prompt), count)):
        if token != ours[position]:
            margin = float(logits[token]) - float(logits[ours[position]])
            said = f"{position} the same, then by a margin of {margin:.2g}"
            return {"tokens": said, "parts_at": position, "margin": margin}
    return {"tokens": f"{count} the same"}


if __name__ == "__main__":
    run(measure)
