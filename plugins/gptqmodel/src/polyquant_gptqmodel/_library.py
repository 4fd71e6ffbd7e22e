"""The one place that imports gptqmodel: what that changes of the process is put back."""

from __future__ import annotations

import re
from typing import Any

from polyquant.plugin import contained

with contained():
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import AWQuantLinear, BaseQuantLinear, PackableQuantLinear
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_aten_kernel import TorchAtenLinear
    from gptqmodel.nn_modules.qlinear.torch_aten_kernel_awq import TorchAtenAwqLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.config import AWQConfig
    from gptqmodel.utils.importer import hf_select_quant_linear_v2
    from gptqmodel.utils.model import hf_convert_gptq_v1_to_v2_format, hf_gptqmodel_post_init

from polyquant_gptqmodel.options import GptqOptions, Options

__all__ = [
    "AWQuantLinear", "AwqTorchLinear", "BaseQuantLinear", "GPTQModel", "PackableQuantLinear", "TorchAtenAwqLinear",
    "TorchAtenLinear", "TorchLinear", "contained", "hf_convert_gptq_v1_to_v2_format", "hf_gptqmodel_post_init",
    "hf_select_quant_linear_v2", "quantize_config",
]  # fmt: skip


def quantize_config(config: Options) -> Any:
    """gptqmodel's QuantizeConfig or AWQConfig, for the modules that `skip` does not name."""
    own = {name: getattr(config, name) for name in ("bits", "group_size", "sym")}
    kind: Any = AWQConfig
    if isinstance(config, GptqOptions):
        kind, own["desc_act"] = QuantizeConfig, config.desc_act
    # a rule that starts with '-:' leaves the modules it matches dense
    dynamic: dict[str, dict[str, Any]] = {rf"-:^{re.escape(name)}$": {} for name in config.skip}
    head = not config.skip_defaults and "lm_head" not in config.skip
    if head:  # without a rule of its own it becomes 8 bit in groups of 32, whatever the others are
        dynamic["lm_head"] = dict(own)
    if isinstance(config, GptqOptions):
        own["act_group_aware"] = not config.desc_act
    with contained():
        return kind(
            **own, format=config.written_layout, lm_head=head, dynamic=dynamic or None, offload_to_disk=False,
            pack_impl="original",  # the others compile a C++ extension, or need a GPU
        )  # fmt: skip
