"""Bytes of AWQ layers from shapes alone, and which layers can be packed."""

from __future__ import annotations

from collections.abc import Sequence

from polyquant.errors import ConfigError
from polyquant.plugin import LayerPlan, WeightInfo, layouts, plan_linears

from polyquant_awq.options import AwqOptions

SCHEME = "awq4"
ATEN_GROUPS = (32, 64, 128, 256)  # what aten::_weight_int4pack_mm_for_cpu takes
ATEN_ROWS = 16  # and what it wants out_features to be a multiple of
TORCH_GROUPS = (-1, 16, 32, 64, 128)
WORD = 8  # weights of one int32 word


def plan_layers(weights: Sequence[WeightInfo], config: AwqOptions) -> list[LayerPlan]:
    """With the kernel still 'auto', for the CPU. Raises ConfigError for a layer that cannot be packed."""
    return plan_linears(weights, config, SCHEME, lambda weight: quantized_bytes(weight, config))


def quantized_bytes(weight: WeightInfo, config: AwqOptions) -> int:
    """Packed weight with scales and zero points, as the kernel keeps it."""
    require_packable(weight, config)
    kernel = config.kernel if config.kernel != "auto" else cpu_kernel(config)
    if kernel == "torch_aten" and not weight.shape[0] % ATEN_ROWS:
        return layouts.int4pack_bytes(weight.shape, config.group_size)
    return layouts.awq_bytes(weight.shape, config.bits, config.group_size)


def cpu_kernel(config: AwqOptions) -> str:
    """torch's int4 matmul where it takes the groups; else unpacking them in each forward pass."""
    return "torch_aten" if config.group_size in ATEN_GROUPS else "torch"


def why_not(config: AwqOptions) -> str:
    """Why the kernel named in `config` cannot be used on a CPU; empty where it can."""
    groups = {"torch_aten": ATEN_GROUPS, "torch": TORCH_GROUPS}.get(config.kernel, ())
    if not groups:
        return "it needs a GPU"
    if config.group_size not in groups:
        return f"it takes a group_size of {', '.join(map(str, groups))}, not {config.group_size}"
    return "" if config.compute_dtype != "float32" else "it computes in bfloat16 or float16, not in float32"


def require_packable(weight: WeightInfo, config: AwqOptions) -> None:
    """Raises ConfigError where the groups or the packed words of a layer do not come out even."""
    out_features, in_features = weight.shape
    what = ""
    if config.group_size != -1 and in_features % config.group_size:
        what = f"group_size {config.group_size} does not divide in_features {in_features}"
    elif out_features % WORD:
        what = f"words hold {WORD} weights, which does not divide out_features {out_features}"
    if what:
        short = weight.name.rpartition(".")[0].rpartition(".")[2]
        raise ConfigError(f"{what} of {weight.name}; use another group_size, or skip=({short!r},)")
