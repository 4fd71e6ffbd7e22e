"""What optimum-quanto is here: its compilers, its C++ unpacking, and transformers' config of it."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import torch
from optimum.quanto.library.extensions import get_extension
from polyquant.plugin import Problem
from polyquant.plugin.process import wait_for_build
from transformers import QuantoConfig

from polyquant_quanto.options import QuantoOptions


def native_problems(device: str) -> list[Problem]:
    """On CUDA quanto compiles its kernels on first use, which needs nvcc."""
    from torch.utils.cpp_extension import CUDA_HOME

    if not device.startswith("cuda") or CUDA_HOME:
        return []
    what = "optimum-quanto compiles its CUDA kernels on first use, and no CUDA compiler (nvcc) is installed"
    fix = f"install the CUDA toolkit {torch.version.cuda} and set CUDA_HOME, or use --device cpu"
    return [Problem(what=what, fix=fix, kind="native")]


def quantize_config(options: QuantoOptions) -> QuantoConfig:
    """The options as transformers takes them; it carries the compute dtype along, as saved checkpoints do."""
    config = QuantoConfig(weights=options.weights, modules_to_not_convert=options.stored_skip)
    config.compute_dtype = options.compute_dtype
    return config


def prepare_unpacking() -> list[str]:
    """Compile quanto's C++ unpacking now, or fall back to its own version in torch, and say so."""
    extension = get_extension("quanto_cpp")
    notes = wait_for_build(Path(extension.build_directory)) if extension._lib is None else []
    try:
        _ = extension.lib
    except Exception as error:  # no compiler, no ninja, or a folder that cannot be written
        logging.getLogger(__name__).debug("quanto_cpp", exc_info=error)
        extension._lib = SimpleNamespace(unpack=_unpack)
        why = str(error).splitlines()[0]
        return [*notes, f"unpacks in torch: quanto's C++ unpacking could not be compiled ({why})"]
    return notes


def _unpack(packed_values: torch.Tensor, bits: int) -> torch.Tensor:
    """What quanto_cpp.unpack does: uint8 (rows, columns) to uint8 (8 / bits * rows, columns)."""
    return torch.cat([(packed_values >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])
