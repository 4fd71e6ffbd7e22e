"""compressed-tensors' own record of the options, and llm-compressor without its talk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from loguru import logger
from polyquant.plugin import Library, contained

from polyquant_compressed_tensors.arguments import activation_arguments, weight_arguments
from polyquant_compressed_tensors.formats import LINEAR
from polyquant_compressed_tensors.options import CompressedTensorsOptions

LLM_COMPRESSOR = Library(distribution="llmcompressor", versions=">=0.14,<0.15")
SCALE_DTYPES: Mapping[str, torch.dtype] = {
    "mxfp4": torch.uint8, "mxfp8": torch.uint8, "nvfp4": torch.float8_e4m3fn
}  # fmt: skip
"""Weights -> the dtype of their scales, and of those of activations beside them, where it is not the model's."""
NAMES = ("llmcompressor", "compressed_tensors")
DISABLED = "LLM_COMPRESSOR_LOG_DISABLED"  # read at its import: it then leaves loguru's handlers alone
METRIC, METRIC_NUMBER = "METRIC", 38  # a level that it logs with, and registers only where its log is not disabled


def quantization_scheme(options: CompressedTensorsOptions, targets: Sequence[str] = (LINEAR,)) -> QuantizationScheme:
    """The scheme of the layers that `targets` names, in the format that `options` give all layers."""
    weights = weight_arguments(options)
    scale = SCALE_DTYPES.get(options.weights)
    dtypes = {} if scale is None else {"scale_dtype": scale, "zp_dtype": scale}
    activations, rounded = None, activation_arguments(options)
    if rounded is not None:
        observer = None if rounded["dynamic"] is True else "static_minmax"
        activations = QuantizationArgs(
            num_bits=weights["num_bits"], type=weights["type"], symmetric=True, observer=observer, **rounded, **dtypes
        )
    return QuantizationScheme(
        targets=list(targets), weights=QuantizationArgs(**weights, **dtypes), input_activations=activations,
        format=options.packed_format,
    )  # fmt: skip


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
