"""The one place that imports autoawq: what that changes of the process is put back, and its farewell is not printed."""

from __future__ import annotations

from polyquant.plugin import contained

with contained():
    from awq import AutoAWQForCausalLM
    from awq.modules.linear import WQLinear_GEMM
    from awq.quantize.quantizer import AwqQuantizer

__all__ = ["AutoAWQForCausalLM", "AwqQuantizer", "WQLinear_GEMM", "contained"]
