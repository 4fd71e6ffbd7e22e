"""In words, what is wrong with what a plugin gave: the answer of a hook, or an error when it was imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import Distribution, EntryPoint, version
from pathlib import Path

from polyquant.options import BackendOptions
from polyquant.types import BackendInfo, LayerInfo, LayerPlan, Problem

_RESULTS: Mapping[str, type] = {
    "backend_info": BackendInfo,
    "validate_environment": list,
    "build_config": BackendOptions,
    "describe_layers": list,
    "plan_layers": list,
    "unpack": dict,
    **dict.fromkeys(("quantize", "save", "write_unpacked"), Path),
    # models, modules and a PackedWeight, whose classes import torch
    **dict.fromkeys(("prepare_for_training", "pack", "quantize_linear"), object),
}
ITEMS: Mapping[str, type] = {
    "validate_environment": Problem,
    "describe_layers": LayerInfo,
    "plan_layers": LayerPlan,
}
"""hook -> what its answer is, and what the items of a list are."""


def result_of(hook: str) -> type:
    """What a hook answers with."""
    if hook != "load":
        return _RESULTS[hook]
    from polyquant.loaded import LoadedModel

    return LoadedModel


def wrong_answer(result: object, wanted: type, item: type | None) -> str:
    """What is wrong with a hook's answer, in words; empty where it has the right type."""
    if result is None:
        return f"must answer with {wanted.__name__}, it answered with NoneType (does it return?)"
    if not isinstance(result, wanted):
        return f"must answer with {wanted.__name__}, it answered with {type(result).__name__}"
    strange = [each for each in result if not isinstance(each, item)] if item and isinstance(result, list) else []
    if strange and item:
        return f"must answer with a list of {item.__name__}, {type(strange[0]).__name__} is in it"
    return ""


def cure_of_import(point: EntryPoint, error: BaseException) -> str:
    """What to do where a plugin fails to import."""
    if isinstance(error, SystemExit):
        return "a plugin must not end the program: raise an error there, or in validate_environment return a Problem"
    own = point.module.partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and error.name:
        if error.name.partition(".")[0] == own:
            return f"the entry point names {point.value}; write that module, or mend the entry point in pyproject.toml"
        return (
            f"install {error.name}; a library that only the hooks need is imported inside them, so that listing works "
            "without it"
        )
    if isinstance(error, AttributeError) and point.attr and str(error).endswith(f"has no attribute {point.attr!r}"):
        return f"the entry point names {point.value}; write {point.attr} = YourBackend() at the end of that module"
    return "mend it there"


def unmet_requirement(distribution: Distribution | None) -> str:
    """What to do where a plugin's own metadata asks for another polyquant than this one; empty where it fits."""
    from packaging.requirements import InvalidRequirement, Requirement

    ours = version("polyquant")
    for text in distribution.requires or () if distribution else ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # of something else: pip would not have installed it
            continue
        meant = requirement.name == "polyquant" and (not requirement.marker or requirement.marker.evaluate())
        if meant and not requirement.specifier.contains(ours, True):
            return f". It requires {requirement}, and polyquant {ours} is installed: pip install '{requirement}'"
    return ""
