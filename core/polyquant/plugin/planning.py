"""What plans have in common: names of modules, and refusals that say what would fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from polyquant.errors import ConfigError
from polyquant.modules import module_of
from polyquant.options import BackendOptions
from polyquant.packable import is_packed
from polyquant.types import LayerPlan, WeightInfo


def quantized_modules(plans: Iterable[LayerPlan]) -> list[str]:
    """Names of the modules that are planned quantized, in their order."""
    return [module_of(plan) for plan in plans if plan.quantized]


def repacked_modules(plans: Iterable[LayerPlan], config: BackendOptions) -> set[str]:
    """Names of the modules whose weights go into polyquant's packed layout: those that `pack` is asked for."""
    return {module_of(plan) for plan in plans if plan.packed is not None} if is_packed(config) else set()


def unfit(weight: WeightInfo, what: str, fixes: Sequence[str] = ()) -> ConfigError:
    """The error for a tensor that the options do not fit.

    what: what does not fit, such as 'group_size 128 does not divide in_features 576'. fixes: options that would, such
    as 'group_size=64'; leaving the module dense is always named last.
    """
    short = module_of(weight).rpartition(".")[2]
    return ConfigError.of_unfit(f"{what} in {weight.name} {tuple(weight.shape)}", [*fixes, f"skip=({short!r},)"])
