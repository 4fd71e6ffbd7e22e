"""torchao's config, and transformers' around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from polyquant.plugin import LayerPlan, module_of
from torchao import quantization as ao
from transformers import TorchAoConfig

from polyquant_torchao.options import TorchAoOptions


def quantize_config(options: TorchAoOptions, planned: Sequence[LayerPlan] = ()) -> TorchAoConfig:
    """The options as transformers takes them; it carries the compute dtype along.

    planned: whose dense layers are named one by one, since transformers misses some of what a model keeps in float32.
    The model's config is to have the words of the options again afterwards.
    """
    layers = (plan for plan in planned if len(plan.shape) > 1 and plan.name.endswith(".weight"))
    dense = [module_of(plan) for plan in layers if not plan.quantized]
    config = TorchAoConfig(torchao_config(options), modules_to_not_convert=dense or options.stored_skip)
    config.compute_dtype = options.compute_dtype
    return config


def torchao_config(options: TorchAoOptions) -> Any:
    """The options as torchao takes them."""
    if options.weights == "int4":
        return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(options.group_size))
    kind = ao.Float8WeightOnlyConfig if options.weights == "float8" else ao.Int8WeightOnlyConfig
    kind = ao.Int8DynamicActivationInt8WeightConfig if options.dynamic_activations else kind
    return kind(set_inductor_config=False)  # torchao changes torch.compile's settings of the process otherwise
