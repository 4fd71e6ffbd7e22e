"""The one place that imports gptqmodel: what that changes of the process is put back."""

from __future__ import annotations

import re
from typing import Any

from polyquant.plugin import contained

with contained():
    from gptqmodel import GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    from gptqmodel.nn_modules.qlinear.torch_aten_kernel_awq import TorchAtenAwqLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.config import AWQConfig
    from gptqmodel.utils.importer import hf_select_quant_linear_v2
    from gptqmodel.utils.model import hf_gptqmodel_post_init

from polyquant_awq.options import VERSION, AwqOptions

__all__ = [
    "AwqTorchLinear", "BaseQuantLinear", "GPTQModel", "TorchAtenAwqLinear", "hf_gptqmodel_post_init",
    "hf_select_quant_linear_v2", "quantize_config",
]  # fmt: skip


def quantize_config(config: AwqOptions) -> Any:
    """gptqmodel's AWQConfig. A rule that starts with '-:' leaves the modules it matches dense."""
    dynamic: dict[str, dict[str, Any]] = {rf"-:^{re.escape(name)}$": {} for name in config.skip}
    own = {"bits": config.bits, "group_size": config.group_size, "sym": not config.zero_point}
    head = not config.skip_defaults and "lm_head" not in config.skip
    if head:  # without a rule of its own it becomes 8 bit in groups of 32, whatever the others are
        dynamic["lm_head"] = own
    with contained():
        return AWQConfig(
            **own, format=VERSION, lm_head=head, dynamic=dynamic or None, offload_to_disk=False, pack_impl="original"
        )
