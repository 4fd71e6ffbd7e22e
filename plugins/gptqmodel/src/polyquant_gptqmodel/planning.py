"""Bytes of gptqmodel's layers from shapes alone, and which layers and kernels go together."""

from __future__ import annotations

from collections.abc import Sequence

from polyquant.plugin import DTYPE_BYTES, LayerPlan, WeightInfo, layouts, plan_linears

from polyquant_gptqmodel.options import GptqOptions, Options

ATEN_GROUPS = (32, 64, 128, 256)  # what aten::_weight_int4pack_mm_for_cpu takes
ATEN_ROWS = 16  # and what it wants out_features to be a multiple of
AWQ_TORCH_GROUPS = (-1, 16, 32, 64, 128)  # what gptqmodel's AwqTorchLinear takes
OWN_CHOICE = ("auto", "library")  # kernel options that leave the choice to this package, or to gptqmodel
SHIFTS_3 = 36  # int32 words of each of the two tables with which TorchLinear unpacks 3-bit weights


def plan_layers(weights: Sequence[WeightInfo], config: Options) -> list[LayerPlan]:
    """With the kernel still 'auto', for the CPU. Raises ConfigError for a layer that cannot be packed."""
    return plan_linears(
        weights, config, config.scheme, lambda weight: quantized_bytes(weight, config),
        packed=lambda weight: layouts.packed_format(
            weight, config.bits, config.group_size, sym=config.sym, ordered=config.desc_act
        ),
    )  # fmt: skip


def quantized_bytes(weight: WeightInfo, config: Options) -> int:
    """Packed weight with scales and zero points, as the kernel keeps it. Raises ConfigError for an unfit layer."""
    is_gptq = isinstance(config, GptqOptions)
    require = layouts.require_gptq if is_gptq else layouts.require_awq
    require(weight, config.bits, config.group_size)
    kernel = config.kernel if config.kernel not in OWN_CHOICE else cpu_kernel(config, weight.dtype)
    if kernel == "torch_aten" and not weight.shape[0] % ATEN_ROWS:
        order = 4 * weight.shape[1] if config.desc_act else 0
        return layouts.int4pack_bytes(weight.shape, config.group_size) + order
    sizes = (weight.shape, config.bits, config.group_size)
    if not is_gptq:
        return layouts.awq_bytes(*sizes)
    shifts = SHIFTS_3 if config.bits == 3 else 32 // config.bits
    tables = 2 * 4 * shifts if kernel in ("torch", "torch_aten", "packed") else 0
    return layouts.gptq_bytes(*sizes, scale_bytes=DTYPE_BYTES[weight.dtype]) + tables


def cpu_kernel(config: Options, dtype: str) -> str:
    """torch's int4 matmul where it takes the layers; else unpacking them in each forward pass."""
    return "torch" if why_not_on_cpu("torch_aten", config, dtype) else "torch_aten"


def why_not_on_cpu(kernel: str, config: Options, dtype: str) -> str:
    """Why `kernel` does not multiply these layers on a CPU; empty where it does."""
    is_awq = config.method == "awq"
    if kernel not in ("torch_aten", "torch"):
        return "it needs a GPU"
    if kernel == "torch_aten" and config.bits != 4:
        return f"it takes 4 bits, not {config.bits}"
    if dtype == "float32" and (is_awq or kernel == "torch_aten"):
        return "it computes in bfloat16 or float16, not in float32"
    groups = ATEN_GROUPS if kernel == "torch_aten" else AWQ_TORCH_GROUPS if is_awq else ()
    if groups and config.group_size not in groups:
        return f"it takes a group_size of {', '.join(map(str, groups))}, not {config.group_size}"
    return ""
