"""The table of memory by model size, from what docs/examples/sizes.py planned."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generate_backends import markdown
from polyquant.support.sizes import size

CARDS = (4, 6, 8, 10, 12, 16, 24, 32, 48, 80, 96, 141, 192)
"""GiB of a card's memory, as cards are sold."""
FREE = 0.94  # of it: the rest is the driver's, the screen's and torch's own
FOUR_BITS = ("bitsandbytes:nf4-dq", "mlx:int4")
DENSE_LEFT = 0.9  # of bfloat16: from here on hardly anything was quantized
NAMES = {"qwen": "Qwen", "llama": "Llama", "smollm": "SmolLM", "mistral": "Mistral", "mixtral": "Mixtral",
         "gemma": "Gemma", "phi": "Phi", "deepseek": "DeepSeek"}  # fmt: skip


def sizes_table(path: Path) -> str:
    """The models of the file, the smallest first."""
    models: Mapping[str, Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    candidates = list(next(iter(models.values()))["candidates"])
    headings = ("model", "parameters", "bfloat16", *(f"`{name}`" for name in candidates), "cache, 8192 tokens",
                "card for 4 bits")  # fmt: skip
    rows = [row(name, models[name], candidates) for name in models]
    return markdown(headings, [tuple(part.replace(" ", "\N{NO-BREAK SPACE}") for part in cells) for cells in rows])


def row(name: str, model: Mapping[str, Any], candidates: list[str]) -> tuple[str, ...]:
    dense = model["dense_bytes"]
    cells = [cell(model["candidates"][candidate], dense) for candidate in candidates]
    return (written(name), f"{dense / 2e9:.3g} B", size(dense), *cells, size(model["kv_cache_bytes"]), card(model))


def cell(planned: Mapping[str, Any], dense: int) -> str:
    """Bytes of a candidate; for one that leaves nearly everything dense, that; a dash where it is refused."""
    if "refused" in planned:
        return "refused"
    weights = planned["weights_bytes"]
    return f"dense ({size(weights)})" if weights > DENSE_LEFT * dense else size(weights)


def card(model: Mapping[str, Any]) -> str:
    """The smallest card that holds the model in 4 bits."""
    plans = [model["candidates"][name] for name in FOUR_BITS]
    needed = min(plan["needed_bytes"] for plan in plans if "needed_bytes" in plan)
    fitting = [gib for gib in CARDS if needed <= FREE * gib * 2**30]
    return f"{fitting[0]} GiB" if fitting else f"none: {size(needed)}"


def written(name: str) -> str:
    """The model as its makers write it, nearly: 'qwen3-30b-a3b' is Qwen3-30B-A3B."""
    head = next((start for start in NAMES if name.startswith(start)), "")
    words = (NAMES.get(head, "") + name.removeprefix(head)).split("-")
    capitals = (word[0].upper() + word[1:] if word in ("nemo", "small", "mini") else word for word in words)
    return re.sub(r"(?<=[-\d])[abkm](?![a-z])", lambda letter: letter[0].upper(), "-".join(capitals))
