"""Measures what a quantized key-value cache costs in quality, and what it saves in bytes.

python docs/examples/cache.py MODEL BACKEND[:PRESET] [WINDOWS]    for example: builtin:smollm2 bitsandbytes:nf4 4

Windows of 512 tokens of the text that comes with polyquant: the first half is a prompt, the second comes in pieces of
16 tokens, and is scored against the same model with a full cache. As many of the newest tokens are in full as if they
came one by one.
"""

from __future__ import annotations

import sys
from typing import Any

import polyquant
from polyquant.loaded import LoadedModel
from polyquant.measure.quality.divergence import kl_divergence, top1_agreement
from polyquant.measure.quality.windows import Window, cut, preset_named
from polyquant.support.texts import evaluation_text

PIECE = 16


def main() -> None:
    import torch

    model, backend, *rest = sys.argv[1:]
    print(f"{'cache':>6} {'bytes a token':>14} {'KL, nats':>10} {'±':>8} {'top-1':>7}")
    reference = None
    for kind in ("keep", "int8", "int4"):
        loaded = polyquant.load(model, backend, device="cpu", kv_cache=kind)
        tokens = loaded.tokenizer(evaluation_text(), add_special_tokens=False).input_ids
        bos, limit = loaded.tokenizer.bos_token_id, int(rest[0]) if rest else 4
        windows = cut(tokens, preset_named("llamacpp-512"), bos=bos, limit=limit)
        logits = torch.cat([scored(loaded, window) for window in windows])
        reference = logits if reference is None else reference
        kl, same = kl_divergence(reference, logits), top1_agreement(reference, logits)
        each, error = loaded.kv_cache_bytes_per_token(tokens[:64]), float(kl.std()) / len(kl) ** 0.5
        print(f"{kind:>6} {each:>14} {float(kl.mean()):>10.6f} {error:>8.6f} {float(same.float().mean()):>7.1%}")


def scored(loaded: LoadedModel, window: Window) -> Any:
    """Logits (scored positions, vocabulary) of a window whose second half comes piece by piece."""
    import torch

    cache, start = loaded.new_cache(), window.first_scored - 1
    later = range(start, len(window.tokens) - 1, PIECE)
    pieces = [window.tokens[:start], *(window.tokens[at : min(at + PIECE, len(window.tokens) - 1)] for at in later)]
    with torch.inference_mode():
        outputs = (loaded.model(torch.tensor([piece]), past_key_values=cache, use_cache=True) for piece in pieces)
        return torch.cat([output.logits[0] for output in outputs][1:])


if __name__ == "__main__":
    main()
