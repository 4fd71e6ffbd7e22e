"""llm-compressor without its talk, and without what it leaves behind in the process."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from loguru import logger
from polyquant.plugin import contained

NAMES = ("llmcompressor", "compressed_tensors")
DISABLED = "LLM_COMPRESSOR_LOG_DISABLED"  # read at its import: it then leaves loguru's handlers alone
METRIC, METRIC_NUMBER = "METRIC", 38  # a level that it logs with, and registers only where its log is not disabled


@contextmanager
def quiet_llm_compressor(*, progress: bool) -> Iterator[None]:
    """In the block llm-compressor logs nothing, and draws its bars only where `progress`.

    Random state, environment, loguru's handlers and warning filters are afterwards what they were before.
    """
    asked_quiet = os.environ.get(DISABLED, "").lower() == "true"
    bars = sys.stderr if progress else io.StringIO()
    for name in NAMES:
        logger.disable(name)
    _register_level()
    try:
        with contained(), torch.random.fork_rng(), redirect_stderr(bars):
            os.environ.update({DISABLED: "true", "TOKENIZERS_PARALLELISM": "false"})
            yield
    finally:
        for name in NAMES[1:] if asked_quiet else NAMES:
            logger.enable(name)


def _register_level() -> None:
    try:
        logger.level(METRIC)
    except ValueError:
        logger.level(METRIC, no=METRIC_NUMBER)
