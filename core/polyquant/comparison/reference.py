"""The reference of a comparison: the dense model's log-probabilities on a text, computed once and kept in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from polyquant.generation import logits_of
from polyquant.models.builtin import cache_folder
from polyquant.models.hashing import content_hash
from polyquant.quality.windows import PRESETS, Window, cut
from polyquant.request import ModelSource


def reference(
    source: ModelSource,
    text: str,
    preset: str = "llamacpp-512",
    *,
    limit: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> tuple[Path, str]:
    """Folder and key of the stored reference of a dense model in float32; computed where it is not there yet.

    limit: number of windows at most. Raises ConfigError where the text is shorter than a window.
    """
    from polyquant import hf
    from polyquant.quality import stored

    tokenizer = hf.load_tokenizer(source)
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    windows = cut(tokens, PRESETS[preset], bos=tokenizer.bos_token_id, limit=limit)
    key = _key(source, preset, windows)
    folder = cache_folder() / "references" / key
    if stored.stored_in(folder, key) is None:
        model = hf.load_dense(source)
        stored.store(folder, key, preset, windows, lambda tokens: logits_of(model, tokens), advance)
    return folder, key


def _key(source: ModelSource, preset: str, windows: Sequence[Window]) -> str:
    return hashlib.sha256(repr((content_hash(source), preset, windows)).encode()).hexdigest()[:32]
