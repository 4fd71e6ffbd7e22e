"""The one place that imports auto_round: what that changes of the process, and of transformers in it, is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from polyquant.environment import contained
from transformers import core_model_loading, modeling_rope_utils, modeling_utils
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

PATCHED: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (transformers.AutoModelForCausalLM, ("from_pretrained",)),
    (core_model_loading.Transpose, ("convert",)),
    (modeling_utils.PreTrainedModel, ("_init_weights",)),
    (modeling_utils, ("no_init_weights",)),
    (torch.Tensor, ("get_dtype",)),
    (
        CompressedTensorsHfQuantizer,
        ("_process_model_before_weight_loading", "_process_model_after_weight_loading"),
    ),
)
"""What auto_round replaces or adds when it is imported, for models and formats that are not loaded through it here."""


@contextmanager
def unpatched() -> Iterator[None]:
    """What the block replaces in transformers and torch is put back, and what it adds is taken away."""
    before = [(owner, name, vars(owner).get(name)) for owner, names in PATCHED for name in names]
    rope = dict(modeling_rope_utils.ROPE_INIT_FUNCTIONS)
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is not None:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)
        for name in set(modeling_rope_utils.ROPE_INIT_FUNCTIONS) - set(rope):
            del modeling_rope_utils.ROPE_INIT_FUNCTIONS[name]


@contextmanager
def running(*, shown: bool) -> Iterator[None]:
    """For quantizing: seeds, print options and whatever else auto-round sets in the process are put back."""
    numpy_state, printing = np.random.get_state(), dict(vars(torch._tensor_str.PRINT_OPTS))  # noqa: NPY002
    threads = torch.get_num_threads()
    try:
        with contained(shown=shown), unpatched(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        vars(torch._tensor_str.PRINT_OPTS).update(printing)
        torch.set_num_threads(threads)


def unpacking_shifts(bits: int) -> torch.Tensor:
    """The shifts with which plain torch unpacks a word; auto-round shares one tensor among all models, on no module."""
    if bits == 3:
        return qlinear_torch.get_wf_3bits_tensor("cpu").clone()
    return torch.arange(0, 32, bits, dtype=torch.int32).unsqueeze(0)


with contained(), unpatched():
    from auto_round import AutoRound, QuantizationScheme, RTNConfig, SignRoundConfig
    from auto_round_extension.torch import qlinear_torch
    from auto_round_extension.torch.qlinear_torch import QuantLinear as TorchLayer
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as TorchLayerGPTQ

__all__ = [
    "AutoRound", "QuantizationScheme", "RTNConfig", "SignRoundConfig", "TorchLayer", "TorchLayerGPTQ", "running",
    "unpacking_shifts", "unpatched",
]  # fmt: skip
