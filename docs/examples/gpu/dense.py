"""The step `dense:SIZE`: the model unquantized in bfloat16, which everything else is read against."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import common
from direct import through_transformers

TOKENS = 256  # of the reference, fixed
TOKENS_SMALL = 64


def measure(arguments: common.Facts, note: common.Note) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    folder, device = Path(arguments["model"]), arguments["device"]
    started = perf_counter()
    model, peak = common.peak_of(lambda: through_transformers(folder, device, torch.bfloat16))
    note({"load_seconds": perf_counter() - started, "load_peak_bytes": peak, "compute_dtype": "bfloat16"})
    note({"stored_bytes": model.get_memory_footprint()})
    vocabulary = len(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    tokens = fixed_tokens(vocabulary, TOKENS_SMALL if arguments["small"] else TOKENS)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens], device=device)).logits[0].float().cpu()
    save_file({"tokens": torch.tensor(tokens), "logits": logits.contiguous()}, folder / "reference.safetensors")
    note({"positions": len(tokens)})
    note(common.speed_of(common.plain_session(model.eval()), vocabulary, small=arguments["small"]))


def fixed_tokens(vocabulary: int, count: int) -> list[int]:
    """The same at every call, on every machine."""
    import random

    rng = random.Random(0)  # noqa: S311  no secret
    return [rng.randrange(vocabulary) for _ in range(count)]


if __name__ == "__main__":
    common.step(measure)
