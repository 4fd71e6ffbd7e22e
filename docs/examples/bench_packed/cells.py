"""What all parts share: a cell and the process that measures it, sizes, loading, and a bare decoding loop."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import polyquant
from polyquant.errors import ConfigError
from polyquant.loaded import LoadedModel
from polyquant.packable import LIBRARY, PACKED
from polyquant.support.files import write_atomically
from polyquant.support.other_work import OtherWork
from polyquant.support.processes import end_with_parent
from polyquant.support.texts import evaluation_text
from polyquant.types import Record

REAL = "builtin:smollm2"
Figures = dict[str, Any]
"""What a cell's process measures: name of a figure -> number, or text such as the compute dtype."""


class Sizes(Record, frozen=True):
    """How much is measured."""

    prompt_tokens: int = 16  # of what is generated from
    new_tokens: int = 128
    long_prompt_tokens: int = 512
    compared_positions: int = 512
    compared_tokens: int = 64  # generated greedily
    trained_tokens: int = 256  # of a step
    steps: int = 5  # that are timed
    small: bool = False  # whether random models are tiny


FULL = Sizes()
SMALL = Sizes(
    prompt_tokens=8, new_tokens=8, long_prompt_tokens=32, compared_positions=24, compared_tokens=8, trained_tokens=32,
    steps=1, small=True,
)  # fmt: skip
"""For a look at whether everything works; the figures mean nothing."""


class Source(Record, frozen=True):
    """Something to load, which is made first where it is not there: see `sources`."""

    model: str  # as `polyquant.load` takes it, or the name of a random model
    backend: str = ""  # which makes a checkpoint of it; empty: the model is loaded as it is
    preset: str = ""
    small: bool = False

    @property
    def name(self) -> str:
        """Of its folder."""
        words = [self.model.replace(":", "-"), self.backend, self.preset, "small" if self.small else ""]
        return "-".join(word for word in words if word)


class Asked(Record, frozen=True):
    """What a part is asked for."""

    sizes: Sizes
    embeddings: str  # of packed models whose speed is measured


class Cell(Record, frozen=True):
    """A row of a table: what a process measures."""

    name: str
    source: Source
    job: Mapping[str, Any]  # keywords of the part's `measure`, beside the source
    sizes: Sizes
    against: str = ""  # the cell that its figures are divided by


class Answer(Record, frozen=True):
    """What a process says."""

    figures: Figures
    reason: str = ""  # why there are none
    other_work_share: float | None = None  # of the cores that it computed on, what other processes took meanwhile


def run(measure: Callable[..., Figures]) -> None:
    """The process of a cell: python -m bench_packed.PART CELL.json ANSWER.json."""
    end_with_parent()
    asked, out = map(Path, sys.argv[1:])
    cell = msgspec.json.decode(asked.read_bytes(), type=Cell)
    others = OtherWork()
    try:
        figures, reason = measure(cell.source, cell.sizes, **cell.job), ""
    except Exception as error:  # of a backend's library, too: the cell says why
        figures, reason = {}, f"{type(error).__name__}: {error}"
        traceback.print_exc()
    share = others.share(int(os.environ["OMP_NUM_THREADS"]))
    write_atomically(out, Answer(figures=figures, reason=reason, other_work_share=share).to_json())


def load_packed(path: str, backend: str, **options: Any) -> LoadedModel:
    """A model on the packed runtime."""
    return polyquant.load(path, backend, device="cpu", **{"kernel": PACKED, "compute_dtype": "float32", **options})


def load_with_library(path: str, backend: str, **options: Any) -> LoadedModel:
    """The same weights with the library's own kernel: in float32, or where it refuses that in the dtype it chooses."""
    given: dict[str, Any] = {**options, "kernel": LIBRARY, "device": "cpu"}
    try:
        return polyquant.load(path, backend, compute_dtype="float32", **given)
    except ConfigError:
        return polyquant.load(path, backend, **given)


def first_tokens(loaded: LoadedModel, count: int) -> list[int]:
    """The first tokens of the text that quality is measured on."""
    tokens: list[int] = loaded.tokenizer(evaluation_text(), add_special_tokens=False).input_ids
    return tokens[:count]


def one_by_one(model: Any, tokens: Sequence[int]) -> Iterator[Any]:
    """Logits (vocabulary,) after each of `tokens`, which come one at a time: the loop of a bare decoding step."""
    import torch

    cache = None
    for token in tokens:
        with torch.inference_mode():
            outputs = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        yield outputs.logits[0, -1]


def greedy(model: Any, prompt: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """The most likely token after `prompt`, then after that, without end; each with its logits (vocabulary,)."""
    import torch

    ids, cache = torch.tensor([list(prompt)]), None
    while True:
        with torch.inference_mode():
            outputs = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits = outputs.logits[0, -1]
        ids = logits.argmax().reshape(1, 1)
        yield int(ids), logits
