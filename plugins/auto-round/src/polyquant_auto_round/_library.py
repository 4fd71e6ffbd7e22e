"""The one place that imports auto_round: what that changes of the process, and of transformers in it, is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from polyquant.plugin import contained
from transformers import core_model_loading, modeling_rope_utils, modeling_utils
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from polyquant_auto_round.options import AutoRoundOptions

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
"""What auto_round replaces or adds when it is imported: for formats that are not read here, and for all models."""


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


with contained(), unpatched():
    from auto_round import RTNConfig, SignRoundConfig
    from auto_round_extension.torch import qlinear_torch
    from auto_round_extension.torch.qlinear_torch import QuantLinear as TorchLayer
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as TorchLayerGPTQ

__all__ = ["PATCHED", "TorchLayer", "TorchLayerGPTQ", "algorithm", "unpacking_shifts", "unpatched"]


def algorithm(config: AutoRoundOptions) -> Any:
    """Rounding to nearest, without the search for scales that needs activations; or tuned rounding."""
    return SignRoundConfig(iters=config.iters) if config.iters else RTNConfig(disable_opt_rtn=True)


def unpacking_shifts(bits: int) -> torch.Tensor:
    """The shifts with which plain torch unpacks a word; auto-round shares one tensor among all models."""
    if bits == 3:
        return qlinear_torch.get_wf_3bits_tensor("cpu").clone()
    return torch.arange(0, 32, bits, dtype=torch.int32).unsqueeze(0)
