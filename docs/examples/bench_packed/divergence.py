"""How far the packed kernels are from the library's product with the same weights: nothing but rounding should differ.

Both compute in float32, where the library does; embeddings are kept. The library gets the text at once. The packed
model gets it at once too, as a prompt: weights are decoded to float32, and torch multiplies. Then token by token, as it
generates: there the kernels round activations to 16-bit integers, and what that changes is the KL of steps to the
prompt. Where the KL of the prompt is large, the library computes otherwise than it is asked to: bitsandbytes in
bfloat16 on processors that have products for it, others round activations to 8 bits.
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
    "rounding_kl": "KL of steps to the prompt, nats",
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
    expected, at_once = library.logits(tokens), packed.logits(tokens)
    one_at_a_time = torch.stack(list(one_by_one(packed.model, tokens)))
    steps = kl_divergence(expected, one_at_a_time)
    return {
        "prompt_kl": float(kl_divergence(expected, at_once).mean()),
        "steps_kl": float(steps.mean()),
        "steps_kl_max": float(steps.max()),
        "rounding_kl": float(kl_divergence(at_once, one_at_a_time).mean()),
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
