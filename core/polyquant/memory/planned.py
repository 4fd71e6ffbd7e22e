"""What a dense tensor is going to be: shared by every backend's plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from polyquant.errors import ConfigError
from polyquant.models.roles import ALWAYS_DENSE, REASONS, SKIPPED, TIED
from polyquant.modules import module_of
from polyquant.options import BackendOptions
from polyquant.packable import quantizes_experts
from polyquant.types import DTYPE_BYTES, LayerPlan, PackedFormat, WeightInfo


def is_linear(weight: WeightInfo, config: BackendOptions) -> bool:
    """Whether a backend that replaces nn.Linear modules takes it: Conv1D, fused experts and embeddings are none."""
    return weight.role in ("linear", "head") and "Linear" in weight.module and not config.skips(weight)


def dense_linears(weights: Sequence[WeightInfo], config: BackendOptions) -> list[str]:
    """Names of the Linear modules that stay dense: what a checkpoint lists as ignored or excluded."""
    return [
        module_of(weight)
        for weight in weights
        if weight.role in ("linear", "head") and "Linear" in weight.module and config.skips(weight)
    ]


def refuse_experts(weights: Sequence[WeightInfo], config: BackendOptions) -> None:
    """Raises ConfigError where experts are fused into one tensor that is to be quantized, and nobody does that."""
    for weight in weights:
        here = bool(weight.stacked) and quantizes_experts(config)  # the core's: `memory.experts`
        if weight.role == "experts" and not config.skips(weight) and not here:
            short = module_of(weight).rpartition(".")[2]
            packs = weight.stacked and hasattr(config, "experts")
            raise ConfigError.of_unfit(
                f"{weight.name} holds the experts of a layer in one tensor {weight.shape}, which is not quantized",
                [*(["kernel='packed', which quantizes each"] if packs else []),
                 f"skip=({short!r},), which keeps them dense"],
            )  # fmt: skip


def plan_linears(
    weights: Sequence[WeightInfo],
    config: BackendOptions,
    scheme: str,
    stored_bytes: Callable[[WeightInfo], int],
    *,
    takes: Callable[[WeightInfo, BackendOptions], bool] = is_linear,
    packed: Callable[[WeightInfo], PackedFormat | None] = lambda weight: None,
) -> list[LayerPlan]:
    """The plan of a backend that packs linear layers and leaves everything else dense, in the order of `weights`.

    stored_bytes: of a tensor that `takes` says is quantized, with scales, zero points and constants. packed: its layout
    with kernel="packed", None where it has none; one of groups that have no place there is none either.
    """

    def placed(weight: WeightInfo) -> PackedFormat | None:
        layout = packed(weight)
        return layout if layout is not None and layout.holds_groups else None

    return [
        LayerPlan(
            name=weight.name, shape=weight.shape, role=weight.role, stored_bytes=stored_bytes(weight),
            bits=config.weight_bits, scheme=scheme, quantized=True, packed=placed(weight),
        )
        if takes(weight, config)
        else plan_dense(weight, config)
        for weight in weights
    ]  # fmt: skip


def plan_dense(weight: WeightInfo, config: BackendOptions) -> LayerPlan:
    """The plan of a tensor that the backend leaves dense, with the reason."""
    module = module_of(weight)
    if weight.tied_to:
        reason = TIED.format(weight.tied_to)
    elif module in config.skip and weight.role not in ALWAYS_DENSE:
        reason = SKIPPED
    else:
        reason = REASONS[weight.role]
    return LayerPlan(
        name=weight.name,
        shape=weight.shape,
        role=weight.role,
        stored_bytes=0 if weight.tied_to else prod(weight.shape) * DTYPE_BYTES[weight.dtype],
        bits=8 * DTYPE_BYTES[weight.dtype],
        scheme=weight.dtype,
        quantized=False,
        reason=reason,
    )
