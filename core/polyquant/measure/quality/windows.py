"""Cuts a text's tokens into windows under a named convention: what is scored, and with how much context before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from polyquant.errors import ConfigError, did_you_mean
from polyquant.types import Record


class Preset(Record, frozen=True):
    """A convention of measuring on long text."""

    name: str
    length: int  # tokens of a window
    stride: int  # tokens from the start of one window to the start of the next
    first_scored: int  # of every window but the first of overlapping ones: the first token that is predicted and scored
    beginning: bool  # whether the first token of each window is replaced by BOS, where the tokenizer has one
    source: str

    @property
    def overlaps(self) -> bool:
        """Whether windows share tokens; the first window is then scored from its second token on."""
        return self.stride < self.length


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(name="llamacpp-512", length=512, stride=512, first_scored=257, beginning=True,
               source="llama.cpp's perplexity tool: windows of 512, the second half is scored"),
        Preset(name="gptq-2048", length=2048, stride=2048, first_scored=1, beginning=False,
               source="the GPTQ paper's evaluation: windows of 2048, every token but the first is scored"),
        Preset(name="hf-stride-512", length=1024, stride=512, first_scored=512, beginning=False,
               source="transformers' guide to perplexity: windows of 1024 that advance by 512, new tokens are scored"),
    )
}  # fmt: skip


class Window(NamedTuple):
    """Tokens to run through a model, and which of them are scored."""

    tokens: tuple[int, ...]
    first_scored: int  # index of the first token that is predicted and scored; at least 1

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.tokens) - self.first_scored


def preset_named(name: str) -> Preset:
    """A preset by name. Raises ConfigError."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; there are {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def cut(tokens: Sequence[int], preset: Preset, *, bos: int | None, limit: int | None = None) -> list[Window]:
    """At most `limit` whole windows; what is left at the end of the text is not scored.

    tokens: of the whole text, without special tokens; bos: the tokenizer's first token, if it has one.
    Raises ConfigError where the text is shorter than one window.
    """
    windows = list(_windows(tokens, preset, bos))[:limit]
    if not windows:
        raise ConfigError(
            f"the text has {len(tokens)} tokens, and one window of {preset.name} takes {preset.length}; "
            "give a longer text"
        )
    return windows


def _windows(tokens: Sequence[int], preset: Preset, bos: int | None) -> Iterator[Window]:
    for start in range(0, len(tokens) - preset.length + 1, preset.stride):
        window = tuple(tokens[start : start + preset.length])
        if preset.beginning and bos is not None:
            window = (bos, *window[1:])
        yield Window(window, 1 if preset.overlaps and start == 0 else preset.first_scored)
