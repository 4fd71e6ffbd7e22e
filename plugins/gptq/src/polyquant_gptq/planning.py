"""Bytes of GPTQ layers from shapes alone, and which layers can be packed."""

from __future__ import annotations

from collections.abc import Sequence

from polyquant.errors import ConfigError
from polyquant.plugin import DTYPE_BYTES, LayerPlan, WeightInfo, layouts, plan_linears

from polyquant_gptq.options import GptqOptions

ATEN_GROUPS = (32, 64, 128, 256)  # what aten::_weight_int4pack_mm_for_cpu takes
ATEN_ROWS = 16  # and what it wants out_features to be a multiple of
SHIFTS_3 = 36  # int32 words of each of the two tables that unpack 3-bit weights


def plan_layers(weights: Sequence[WeightInfo], config: GptqOptions) -> list[LayerPlan]:
    """With the kernel still 'auto', for the CPU. Raises ConfigError for a layer that cannot be packed."""
    return plan_linears(weights, config, config.scheme, lambda weight: quantized_bytes(weight, config))


def quantized_bytes(weight: WeightInfo, config: GptqOptions) -> int:
    """Packed weight with scales and zero points, as the kernel keeps it."""
    require_packable(weight, config)
    kernel = config.kernel if config.kernel != "auto" else cpu_kernel(config, weight.dtype)
    if kernel == "torch_aten" and weight.shape[0] % ATEN_ROWS:
        kernel = "torch"
    if kernel == "torch_aten":
        order = 4 * weight.shape[1] if config.desc_act else 0
        return layouts.int4pack_bytes(weight.shape, config.group_size) + order
    stored = layouts.gptq_bytes(weight.shape, config.bits, config.group_size, scale_bytes=DTYPE_BYTES[weight.dtype])
    shifts = SHIFTS_3 if config.bits == 3 else 32 // config.bits
    return stored + (2 * 4 * shifts if kernel == "torch" else 0)


def cpu_kernel(config: GptqOptions, dtype: str) -> str:
    """torch's int4 matmul where it takes the layers; else unpacking them in each forward pass."""
    return "torch_aten" if not why_not_aten(config, dtype) else "torch"


def why_not_aten(config: GptqOptions, dtype: str) -> str:
    """Why torch's int4 matmul does not take these layers; empty where it does."""
    if config.bits != 4:
        return f"it takes 4 bits, not {config.bits}"
    if config.group_size not in ATEN_GROUPS:
        return f"it takes a group_size of {', '.join(map(str, ATEN_GROUPS))}, not {config.group_size}"
    return "" if dtype != "float32" else "it computes in bfloat16 or float16, not in float32"


def require_packable(weight: WeightInfo, config: GptqOptions) -> None:
    """Raises ConfigError where the groups or the packed words of a layer do not come out even."""
    out_features, in_features = weight.shape
    word = 32 if config.bits == 3 else 32 // config.bits  # weights that fill whole words
    what = ""
    if config.group_size != -1 and in_features % config.group_size:
        what = f"group_size {config.group_size} does not divide in_features {in_features}"
    elif in_features % word or out_features % word:
        what = f"{config.bits}-bit words hold {word} weights, which does not divide {out_features} x {in_features}"
    if what:
        short = weight.name.rpartition(".")[0].rpartition(".")[2]
        raise ConfigError(f"{what} of {weight.name}; use another group_size, or skip=({short!r},)")
