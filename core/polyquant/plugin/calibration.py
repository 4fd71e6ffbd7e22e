"""Calibration text: read from a file, and cut into windows of tokens for a backend that needs sample activations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyquant.errors import ConfigError
from polyquant.support.texts import calibration_text
from polyquant.support.texts.named import read_utf8

LEAST_TOKENS = 256  # below, scales fit the sample and nothing else


def read_calibration(path: str | Path) -> list[str]:
    """Paragraphs of a UTF-8 text file. Raises ConfigError where it is missing, empty or not UTF-8."""
    text = read_utf8(Path(path), "calibration text ")
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    if not paragraphs:
        raise ConfigError(f"calibration text {path} is empty; give some pages of text like what the model will read")
    return paragraphs


def token_windows(tokenizer: Any, texts: Sequence[str], *, length: int, count: int) -> list[list[int]]:
    """At most `count` windows of `length` token ids (the last one may be shorter), cut from the texts in their order.

    texts: none of them: the prose that comes with polyquant. Raises ConfigError for fewer tokens than LEAST_TOKENS.
    """
    joined = "\n\n".join(texts) if texts else calibration_text()
    ids: list[int] = tokenizer(joined, add_special_tokens=False).input_ids
    if len(ids) < LEAST_TOKENS:
        raise ConfigError(
            f"the calibration text has {len(ids)} tokens, at least {LEAST_TOKENS} are needed, and "
            f"{count * length} would be used; give more text (--calibration FILE)"
        )
    windows = [ids[start : start + length] for start in range(0, len(ids), length)]
    return windows[:count]
