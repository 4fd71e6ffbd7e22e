"""Fused experts in the packed layout, as their backend would have each of them as a linear layer: plans from shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from msgspec.structs import replace

from polyquant.errors import ConfigError
from polyquant.modules import module_of
from polyquant.options import BackendOptions
from polyquant.packable import AUTO, QUANTIZE, quantizes_experts
from polyquant.types import LayerPlan, WeightInfo

PlanLayers = Callable[[Sequence[WeightInfo]], Sequence[LayerPlan]]


def one_expert(weight: WeightInfo) -> WeightInfo:
    """An expert of a stacked tensor, as if it were a linear layer: (out_features, in_features)."""
    rows, columns = weight.shape[1:] if weight.stacked == "out_in" else weight.shape[:0:-1]
    return replace(weight, shape=(rows, columns), role="linear", module="Linear", stacked="")


def left_dense(weights: Sequence[WeightInfo], config: BackendOptions) -> bool:
    """Whether a model has experts that stay dense only because nobody has said what becomes of them.

    Those that a checkpoint holds packed do not.
    """
    undecided = getattr(config, "experts", "") == AUTO and not quantizes_experts(config)
    return undecided and any(weight.stacked and not weight.parts and not config.skips(weight) for weight in weights)


def with_experts(
    plans: Sequence[LayerPlan], weights: Sequence[WeightInfo], config: BackendOptions, plan: PlanLayers
) -> list[LayerPlan]:
    """A backend's plans for `weights`, with the experts in the packed layout where the options ask for it.

    plan: the backend's own plans, of other weights. Experts whose matrices are not both such as have a place there
    stay as they were planned. Raises ConfigError for those where experts="quantize" asks for them, and where there
    are none at all.
    """
    if not quantizes_experts(config):
        return list(plans)
    asked = getattr(config, "experts", "") == QUANTIZE
    experts = [weight for weight in weights if weight.role == "experts" and not config.skips(weight)]
    if asked and not experts:
        raise ConfigError("this model has no fused experts that are not skipped: leave experts out")
    planned: dict[str, LayerPlan] = {}
    for _, group in groupby(experts, module_of):
        layer = list(group)
        found = {weight.name: _planned(weight, plan) for weight in layer}
        whole = {name: each for name, each in found.items() if each is not None}
        if len(whole) == len(layer):
            planned |= whole
        elif asked:
            left = next(weight for weight in layer if found[weight.name] is None)
            why = f"{left.module} {left.shape}, which has no place in the packed layout"
            raise ConfigError(f"{left.name} is of {why}: leave experts out")
    return [planned.get(each.name, each) for each in plans]


def _planned(weight: WeightInfo, plan: PlanLayers) -> LayerPlan | None:
    """The plan of a tensor of experts; None where it has no place in the layout."""
    if not weight.stacked:
        return None
    expert = one_expert(weight)
    (like,) = plan([expert])
    if like.packed is None:
        return None
    nbytes = weight.shape[0] * like.packed.nbytes(expert.shape)
    return replace(like, shape=weight.shape, role="experts", stored_bytes=nbytes)
