"""torchao's config, and transformers' around it."""

from __future__ import annotations

from typing import Any

import torch
from torchao import quantization as ao
from transformers import TorchAoConfig

from polyquant_torchao.options import TorchAoOptions


def quantize_config(options: TorchAoOptions) -> TorchAoConfig:
    """The options as transformers takes them; it carries the compute dtype along."""
    config = TorchAoConfig(_torchao_config(options), modules_to_not_convert=options.stored_skip)
    config.compute_dtype = options.compute_dtype
    return config


def _torchao_config(options: TorchAoOptions) -> Any:
    if options.weights == "int4":
        return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(options.group_size))
    kind = ao.Float8WeightOnlyConfig if options.weights == "float8" else ao.Int8WeightOnlyConfig
    kind = ao.Int8DynamicActivationInt8WeightConfig if options.dynamic_activations else kind
    return kind(set_inductor_config=False)  # torchao changes torch.compile's settings of the process otherwise
