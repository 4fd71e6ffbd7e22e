"""A search from the model's name to the assignment: plan, measure each part, choose, measure the whole, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import join
from typing import Any

from polyquant.errors import ConfigError
from polyquant.isolated import handles
from polyquant.loading import emulation
from polyquant.loading.options import split_options
from polyquant.loading.quantize import save_verified
from polyquant.loading.settle import flag_words
from polyquant.models import builtin
from polyquant.searching.formats import Formats
from polyquant.searching.knapsack import assign
from polyquant.searching.loading import loader
from polyquant.searching.measuring import Measuring
from polyquant.searching.options import SearchOptions
from polyquant.searching.records import Assigned, Assignment, Uniform
from polyquant.searching.units import as_options, units_of
from polyquant.support.outputs import require_free
from polyquant.support.progress import SILENT, Progress, Step
from polyquant.support.sizes import parse_size, size


def search(
    model: str | Path, revision: str | None, memory: int | str, backend: str, given: Mapping[str, Any],
    options: SearchOptions, texts: Sequence[str], out: Path | None, progress: Progress | None, *, overwrite: bool,
) -> Assignment:  # fmt: skip
    """See `polyquant.search`."""
    budget, progress = parse_size(memory), progress or SILENT
    backend, given = handles.written(backend, given)
    handle = handles.backend(backend)
    how, own = split_options(given)
    emulation.require_none(how.emulate_activations, "search")
    shared = {name: value for name, value in given.items() if name not in own}
    if out is not None:
        require_free(out, overwrite=overwrite, keeps=(Path(model),))
    formats = Formats(model, revision, handle, own, how, options.formats)
    units = units_of(formats.searched, grouped=options.by == "group")
    least = formats.rest_bytes + sum(
        min(formats.nbytes(name, unit.modules) for name in formats.uniform) for unit in units
    )
    if budget < least:
        raise ConfigError(
            f"{size(budget)} is too little: with the smallest of {', '.join(formats.uniform)} everywhere {model} takes "
            f"{size(least)} ({least} bytes), {size(formats.rest_bytes)} of it for what stays as it is"
        )
    with loader(formats, shared, texts) as models:
        measuring = Measuring(formats, models.load, options, texts, progress)
        measuring.everything(units)
        chosen = assign([measuring.choices(unit) for unit in units], budget - formats.rest_bytes)
        by_module = {name: choice.format for unit, choice in zip(units, chosen, strict=True) for name in unit.modules}
        found = as_options(by_module, formats.usual, formats.usual_format)
        progress.step(Step(what="loading what was found"))
        loaded = models.load(found, out, overwrite=overwrite)
        quality = measuring.quality(loaded)
        if out is not None and not formats.made_first:
            progress.step(Step(what="writing it"))
            save_verified(loaded, handle, out, how, overwrite=overwrite)
    uniform = [
        Uniform(format=name, stored_bytes=planned.stored_bytes, fits=planned.stored_bytes <= budget,
                quality=measuring.uniform(name))
        for name, planned in formats.uniform.items()
    ]  # fmt: skip
    notes = list(formats.notes)
    if better := [each for each in uniform if each.fits and each.quality.kl_mean < quality.kl_mean]:
        notes.append(f"{better[0].format} for everything fits, and is closer: what the parts lose does not add up here")
    if caution := builtin.CAUTION.get(formats.name):
        notes.append(caution)
    words = ["polyquant", "quantize", formats.name, "--backend", handle.name, *flag_words(formats.options(found))]
    return Assignment(
        model=formats.name, backend=handle.name, memory_bytes=budget,
        stored_bytes=formats.planned(found).stored_bytes,
        kl_predicted=sum(choice.kl for choice in chosen), quality=quality,
        assigned=tuple(
            Assigned(modules=unit.modules, format=choice.format, stored_bytes=choice.nbytes, kl=choice.kl)
            for unit, choice in zip(units, chosen, strict=True)
        ),
        uniform=tuple(sorted(uniform, key=lambda each: each.stored_bytes)),
        options=formats.options(found), checkpoint=str(out or ""), notes=tuple(notes),
        command=join([*words, "--out", str(out or "DIR")]),
    )  # fmt: skip
