"""llm-compressor without its talk, and without what it leaves behind in the process."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from loguru import logger
from polyquant.environment import quiet_imports
from tqdm import tqdm

NAMES = ("llmcompressor", "compressed_tensors")
DISABLED = "LLM_COMPRESSOR_LOG_DISABLED"  # read at its import: it then leaves loguru's handlers alone
METRIC, METRIC_NUMBER = "METRIC", 38  # a level that it logs with, and registers only where its log is not disabled


@contextmanager
def quiet_llm_compressor(*, progress: bool) -> Iterator[None]:
    """In the block llm-compressor logs nothing, and draws its bars only where `progress`.

    Random state, environment and warning filters are afterwards what they were before.
    """
    before, asked_quiet = dict(os.environ), os.environ.get(DISABLED, "").lower() == "true"
    python_state, draw = random.getstate(), tqdm.__init__
    os.environ.update({DISABLED: "true", "TOKENIZERS_PARALLELISM": "false"})
    if not progress:
        tqdm.__init__ = lambda self, *args, **kwargs: draw(self, *args, **{**kwargs, "disable": True})
    for name in NAMES:
        logger.disable(name)
    _register_level()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings(), quiet_imports():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            yield
    finally:
        tqdm.__init__ = draw
        random.setstate(python_state)
        for name in (DISABLED, "TOKENIZERS_PARALLELISM"):
            os.environ.pop(name)
            os.environ.update({name: before[name]} if name in before else {})
        for name in NAMES[1:] if asked_quiet else NAMES:
            logger.enable(name)


def _register_level() -> None:
    try:
        logger.level(METRIC)
    except ValueError:
        logger.level(METRIC, no=METRIC_NUMBER)
