"""A loaded model against the stored reference, window by window. Imports torch."""

from __future__ import annotations

from pathlib import Path

import torch

from polyquant.errors import PolyquantError
from polyquant.loaded import LoadedModel
from polyquant.measure.quality import stored
from polyquant.measure.quality.index import stored_in
from polyquant.measure.quality.metrics import Tally
from polyquant.measure.quality.records import Quality
from polyquant.support.malloc import freeing_at_once
from polyquant.support.progress import SILENT, Progress, Step

LOGITS_BYTES = 8 * 1024 * 1024  # blocks of this size and more are logits, which come and go between what stays


def measure_quality(loaded: LoadedModel, folder: Path, key: str, progress: Progress = SILENT) -> Quality:
    """The model against stored log-probabilities; neither's are ever all in memory.

    Raises PolyquantError where the reference is not there, ModelError where the model's tokenizer is another one.
    """
    index = stored_in(folder, key)
    if index is None:
        raise PolyquantError(f"{folder} holds no reference with the key {key}; measure the reference again")
    stored.require_same_tokens(index, loaded.tokenizer.convert_ids_to_tokens)
    tally = Tally()
    with freeing_at_once(LOGITS_BYTES):
        for number, window in enumerate(index.windows):
            candidate = stored.scored(loaded.logits(window.tokens), window).cpu()
            targets = torch.tensor(window.tokens[window.first_scored :])
            tally.add(stored.read_window(folder, index, number), candidate, targets)  # read when the model is done
            del candidate
            progress.step(Step(what="quality", done=number + 1, of=len(index.windows)))
    return tally.result(index.preset, storage_error=index.storage_error)
