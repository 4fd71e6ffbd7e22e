"""Whether the tensors of a checkpoint are those that its model needs: none missing, none more, none of other shape."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from polyquant.errors import ModelError
from polyquant.models.versions import VERSION_5, progress_bars, tied_tensors

NAMED = 5  # in a message


class Misfit(NamedTuple):
    """How a checkpoint and its model differ, less what transformers itself ignores; names as the model has them."""

    missing: Collection[str]  # without them transformers puts random numbers there
    unexpected: Collection[str]
    mismatched: Collection[tuple[str, tuple[int, ...], tuple[int, ...]]] = ()  # name, shape stored, shape of the model


def require_fit(name: str, misfit: Misfit) -> None:
    """Raises ModelError, with the tensors' names, where a checkpoint called `name` does not fit its model."""
    said = []
    if misfit.missing:
        said.append(f"{_tensors(misfit.missing)} of the model {_are(misfit.missing)} not in the checkpoint")
    if misfit.unexpected:
        said.append(f"{_tensors(misfit.unexpected)} of the checkpoint {_are(misfit.unexpected)} not in the model")
    if misfit.mismatched:
        shapes = [f"{tensor} has the shape {held} in its weight files, and {wanted} by its config.json"
                  for tensor, held, wanted in sorted(misfit.mismatched)]  # fmt: skip
        said.append("; ".join(shapes[:NAMED]) + (f" and {len(shapes) - NAMED} more" if len(shapes) > NAMED else ""))
    if said:
        raise ModelError(
            f"{name}: {'; '.join(said)}; one of the two belongs to another model or is damaged: fetch or write it again"
        )


def _tensors(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:NAMED])
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _are(names: Collection[str]) -> str:
    return "is" if len(names) == 1 else "are"


def misfit(skeleton: Any, tensors: Mapping[str, Any]) -> Misfit:
    """How a checkpoint of these tensors, which may be on the meta device, differs from the model of a skeleton."""
    if not VERSION_5:
        return _misfit_by_names(skeleton, tensors)
    with progress_bars(enabled=False):
        return reporting(
            type(skeleton).from_pretrained, None, config=skeleton.config, state_dict=dict(tensors),
            device_map={"": "meta"}, trust_remote_code=False,
        )[1]  # fmt: skip


def renamed(skeleton: Any, names: Iterable[str]) -> dict[str, str]:
    """Name of a checkpoint's tensor, or of a part of a packed one -> what transformers makes of it in the model.

    Experts that are stored one by one get the name of the tensor that they become.
    """
    if not VERSION_5:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(skeleton)
    one = [each for each in conversions if isinstance(each, WeightRenaming)]
    many = [each for each in conversions if isinstance(each, WeightConverter)]
    own, prefix = skeleton.state_dict(), skeleton.base_model_prefix

    @cache
    def whole(name: str) -> str:
        to: str = rename_source_key(name, one, many, prefix, own)[0]
        return to

    def in_model(name: str) -> str:
        if (to := whole(name)) in own:
            return to
        parts = name.split(".")  # else a part of a packed weight goes where the weight of its layer does
        layers = (end for end in range(len(parts) - 1, 0, -1) if whole(".".join((*parts[:end], "weight"))) in own)
        if (end := next(layers, 0)) == 0:
            return to
        return ".".join((whole(".".join((*parts[:end], "weight"))).removesuffix(".weight"), *parts[end:]))

    return {name: to for name in names if name not in own and (to := in_model(name)) != name}


def reporting(from_pretrained: Callable[..., Any], *arguments: Any, **more: Any) -> tuple[Any, Misfit]:
    """The model that transformers loads, and how its checkpoint differs from it, which transformers only logs."""
    table, logger = _Table(), logging.getLogger("transformers.modeling_utils")
    logger.addFilter(table)
    try:
        model, report = from_pretrained(*arguments, output_loading_info=True, ignore_mismatched_sizes=True, **more)
    except RuntimeError:
        if not table.unmade:
            raise
        return None, Misfit(table.unmade, ())
    finally:
        logger.removeFilter(table)
    shapes = [(name, tuple(held), tuple(wanted)) for name, held, wanted in report["mismatched_keys"]]
    return model, Misfit(report["missing_keys"], report["unexpected_keys"], shapes)


class _Table(logging.Filter):
    """Takes transformers' table of what does not fit out of the log: what is in it is raised, or reported.

    The names of tensors that could not be put together, as of experts that are not all there, stand nowhere else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unmade: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "LOAD REPORT" not in message:
            return True
        rows = (line.split("|") for line in message.splitlines() if "CONVERSION" in line)
        self.unmade += [row[0].strip() for row in rows]
        return False


def _misfit_by_names(skeleton: Any, tensors: Mapping[str, Any]) -> Misfit:
    own, prefix = skeleton.state_dict(), f"{skeleton.base_model_prefix}."
    renamed = getattr(skeleton, "_checkpoint_conversion_mapping", None) or {}
    found = {}
    for stored, tensor in tensors.items():
        name = stored
        for pattern, to in renamed.items():
            name = re.sub(pattern, to, name)
        found[name if name in own or prefix + name not in own else prefix + name] = tensor
    tied = tied_tensors(skeleton)
    both = {name for pair in tied.items() for name in pair if not found.keys().isdisjoint(pair)}
    obsolete = [*(skeleton._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    return Misfit(
        _less(own.keys() - found.keys() - both, skeleton._keys_to_ignore_on_load_missing),
        _less(found.keys() - own.keys(), obsolete),
        [(name, tuple(found[name].shape), tuple(own[name].shape)) for name in found.keys() & own.keys()
         if found[name].shape != own[name].shape],
    )  # fmt: skip


def _less(names: Collection[str], ignored: Iterable[str] | None) -> set[str]:
    return {name for name in names if not any(re.search(pattern, name) for pattern in ignored or ())}
