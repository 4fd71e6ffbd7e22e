"""The one place that imports auto-gptq: what that changes of the process is put back."""

from __future__ import annotations

from typing import Any

from polyquant.plugin import contained

with contained():
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import _base as base
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP
    from auto_gptq.nn_modules.qlinear import qlinear_cuda, qlinear_cuda_old

from polyquant_autogptq.options import AutogptqOptions

PLAIN, ORDERED = qlinear_cuda_old.QuantLinear, qlinear_cuda.QuantLinear
"""The library's layers: without and with columns in an order of their own. On a CPU both unpack in each pass."""

__all__ = ["GPTQ_CAUSAL_LM_MODEL_MAP", "ORDERED", "PLAIN", "base", "quantize_config"]


def quantize_config(config: AutogptqOptions) -> Any:
    """The library's own BaseQuantizeConfig."""
    return BaseQuantizeConfig(bits=config.bits, group_size=config.group_size, desc_act=config.desc_act, sym=config.sym)
