"""The reference's log-probabilities on disk, window by window, so that they are computed once and never all in memory.

Format: each position's log-probabilities as uint16 steps between its lowest and its highest, two float32 beside them;
like llama.cpp's --kl-divergence-base, without its cut at 16 nats below the highest. On SmolLM2-135M (1020 positions)
the mean of KL(stored || exact) is 5e-10. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from polyquant.errors import ModelError
from polyquant.measure.quality.index import INDEX, StoredReference
from polyquant.measure.quality.metrics import CHUNK_POSITIONS
from polyquant.measure.quality.windows import Window
from polyquant.support.files import atomic_folder
from polyquant.support.progress import SILENT, Progress, Step

STEPS = 2**16 - 1


def store(
    folder: Path,
    key: str,
    preset: str,
    windows: Sequence[Window],
    logits: Callable[[Sequence[int]], Any],
    progress: Progress = SILENT,
    *,
    spell: Callable[[list[int]], list[str]] | None = None,
) -> StoredReference:
    """Run every window through `logits` and write the folder, all or nothing.

    logits: tokens -> (positions, vocabulary); spell: a tokenizer's convert_ids_to_tokens, to tell later whether a
    candidate means the same by the tokens.
    """
    errors: list[torch.Tensor] = []
    vocabulary = 0
    with atomic_folder(folder, overwrite=True) as partial:
        for number, window in enumerate(windows):
            exact = torch.log_softmax(scored(logits(window.tokens), window).float(), dim=-1)
            vocabulary = int(exact.shape[1])
            low, high = exact.min(dim=-1, keepdim=True).values, exact.max(dim=-1, keepdim=True).values
            step = ((high - low) / STEPS).clamp_min(torch.finfo(torch.float32).tiny)
            codes = ((exact - low) / step).round_().to(torch.uint16)
            save_file({"codes": codes, "low": low, "step": step}, partial / _name(number))
            kept = _restore(codes, low, step)
            errors.append((kept.exp() * (kept - exact)).sum(dim=-1))
            progress.step(Step(what="reference", done=number + 1, of=len(windows)))
        used = sorted({token for window in windows for token in window.tokens}) if spell else []
        index = StoredReference(
            key=key, preset=preset, windows=list(windows), vocabulary=vocabulary,
            storage_error=float(torch.cat(errors).double().mean()),
            spelled=dict(zip(used, spell(used), strict=True)) if spell else {},
        )  # fmt: skip
        (partial / INDEX).write_text(index.to_json())
    return index


def require_same_tokens(index: StoredReference, spell: Callable[[list[int]], list[str | None]]) -> None:
    """Raises ModelError where a candidate's tokenizer spells the tokens of the windows otherwise.

    spell: its convert_ids_to_tokens. Two models that number their tokens differently cannot be compared.
    """
    ids = list(index.spelled)
    pairs = zip(ids, index.spelled.values(), spell(ids), strict=True)
    different = [(token, reference, candidate) for token, reference, candidate in pairs if reference != candidate]
    if different:
        token, reference, candidate = different[0]
        raise ModelError(
            f"the tokenizers differ in {len(different)} of the text's {len(ids)} tokens: {token} is {reference!r} in "
            f"the reference and {candidate!r} here; is this a checkpoint of another model?"
        )


def read(folder: Path, index: StoredReference) -> Iterator[tuple[Window, Any]]:
    """(window, log-probabilities of its scored positions), one window at a time. Raises ModelError."""
    for number, window in enumerate(index.windows):
        yield window, read_window(folder, index, number)


def read_window(folder: Path, index: StoredReference, number: int) -> Any:
    """Log-probabilities of a window's scored positions, (positions, vocabulary), float32. Raises ModelError."""
    window = index.windows[number]
    try:
        tensors = load_file(folder / _name(number))
        codes, low, step = tensors["codes"], tensors["low"], tensors["step"]
        shapes = (tuple(codes.shape), tuple(low.shape), tuple(step.shape))
        wanted = ((window.scored, index.vocabulary), (window.scored, 1), (window.scored, 1))
        if shapes != wanted:  # multiplied as they are, they could take more memory than there is
            raise ValueError(f"its tensors have the shapes {shapes}, {wanted} were expected")
        return _restore(codes, low, step)
    except Exception as error:
        raise ModelError(f"{folder / _name(number)} is damaged ({error}); delete {folder}") from error


def scored(logits: Any, window: Window) -> Any:
    """The rows of a window's logits that predict its scored tokens."""
    return logits[window.first_scored - 1 : len(window.tokens) - 1]


def _restore(codes: Any, low: Any, step: Any) -> Any:
    """Steps as log-probabilities that sum to one again, some positions at a time."""
    rows = torch.empty(codes.shape)
    for start in range(0, len(codes), CHUNK_POSITIONS):
        chunk = slice(start, start + CHUNK_POSITIONS)
        rows[chunk] = torch.log_softmax(codes[chunk].to(torch.int32) * step[chunk] + low[chunk], dim=-1)
    return rows


def _name(number: int) -> str:
    return f"window-{number:05}.safetensors"
