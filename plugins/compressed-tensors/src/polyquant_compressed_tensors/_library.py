"""compressed-tensors' own record of the options, and llm-compressor without its talk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from loguru import logger
from polyquant.plugin import Library, contained

from polyquant_compressed_tensors.formats import LINEAR
from polyquant_compressed_tensors.options import CompressedTensorsOptions

LLM_COMPRESSOR = Library(distribution="llmcompressor", versions=">=0.14,<0.15")
NAMES = ("llmcompressor", "compressed_tensors")
DISABLED = "LLM_COMPRESSOR_LOG_DISABLED"  # read at its import: it then leaves loguru's handlers alone
METRIC, METRIC_NUMBER = "METRIC", 38  # a level that it logs with, and registers only where its log is not disabled


def quantization_scheme(options: CompressedTensorsOptions, targets: Sequence[str] = (LINEAR,)) -> QuantizationScheme:
    """The scheme of the layers that `targets` names, in the format that `options` give all layers."""
    weights = options.weight_arguments
    if options.weights in ("mxfp4", "nvfp4"):
        weights["scale_dtype"] = torch.uint8 if options.weights == "mxfp4" else torch.float8_e4m3fn
        weights["zp_dtype"] = weights["scale_dtype"]
    activations = None
    if options.dynamic_activations:
        activations = QuantizationArgs(
            num_bits=8, type=weights["type"], symmetric=True, dynamic=True, observer=None, **_activations(options)
        )
    return QuantizationScheme(
        targets=list(targets), weights=QuantizationArgs(**weights), input_activations=activations,
        format=options.packed_format,
    )  # fmt: skip


def _activations(options: CompressedTensorsOptions) -> dict[str, Any]:
    return {"strategy": "group", "group_size": 128} if options.strategy == "block" else {"strategy": "token"}


@contextmanager
def quiet_llm_compressor(*, progress: bool) -> Iterator[None]:
    """In the block llm-compressor logs nothing, and draws its bars only where `progress`.

    Random state, environment, loguru's handlers and warning filters are afterwards what they were before.
    """
    asked_quiet = os.environ.get(DISABLED, "").lower() == "true"
    for name in NAMES:
        logger.disable(name)
    _register_level()
    try:
        with contained(progress=progress), torch.random.fork_rng():
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
