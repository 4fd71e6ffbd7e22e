"""The one place that imports gptqmodel: what that changes of the process is put back."""

from __future__ import annotations

import re
from typing import Any

from polyquant.plugin import contained

with contained():
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear, PackableQuantLinear
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_aten_kernel import TorchAtenLinear
    from gptqmodel.utils.importer import hf_select_quant_linear_v2
    from gptqmodel.utils.model import hf_convert_gptq_v1_to_v2_format, hf_gptqmodel_post_init

from polyquant_gptq.options import PER_LAYER, GptqOptions

__all__ = [
    "BaseQuantLinear", "GPTQModel", "PackableQuantLinear", "TorchAtenLinear", "TorchLinear",
    "hf_convert_gptq_v1_to_v2_format", "hf_gptqmodel_post_init", "hf_select_quant_linear_v2", "quantize_config",
]  # fmt: skip


def quantize_config(config: GptqOptions) -> Any:
    """gptqmodel's QuantizeConfig. A rule that starts with '-:' leaves the modules it matches dense."""
    dynamic: dict[str, dict[str, Any]] = {rf"-:^{re.escape(name)}$": {} for name in config.skip}
    head = not config.skip_defaults and "lm_head" not in config.skip
    if head:  # without a rule of its own it becomes 8 bit in groups of 32, whatever the others are
        dynamic["lm_head"] = {name: getattr(config, name) for name in PER_LAYER}
    with contained():
        return QuantizeConfig(
            bits=config.bits, group_size=config.group_size, desc_act=config.desc_act, sym=config.sym,
            act_group_aware=not config.desc_act, format=config.stored_format, lm_head=head, dynamic=dynamic or None,
            offload_to_disk=False,
            pack_impl="original",  # the others compile a C++ extension, or need a GPU
        )  # fmt: skip
