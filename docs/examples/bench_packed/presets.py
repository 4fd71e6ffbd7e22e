"""The presets of the installed backends that have a place in the packed layout: read from the cards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import polyquant
from polyquant import Backend
from polyquant.errors import PolyquantError
from polyquant.packable import PACKED, PackableOptions
from polyquant.types import Record, WeightInfo

from bench_packed.cells import REAL, Asked, Cell, Source

BITS = (4, 8)
NF4 = "bitsandbytes:nf4"
PROBE = WeightInfo(
    name="model.layers.0.mlp.up_proj.weight", shape=(1536, 576), dtype="float32", role="linear", module="Linear"
)
"""A layer of SmolLM2."""


class Preset(Record, frozen=True):
    """A preset, and what is loaded for it."""

    name: str  # BACKEND:PRESET
    backend: str
    bits: int
    source: Source  # the dense model, or a checkpoint that the backend makes of it first
    options: Mapping[str, object]  # to load it with; a checkpoint stores them


class LeftOut(Record, frozen=True):
    """A preset or a backend that could have a place in the layout, and is not measured."""

    name: str
    reason: str


def packed_presets(model: str = REAL) -> Iterator[Preset | LeftOut]:
    """Every preset of 4 or 8 bits with a place in the packed layout, of every backend that runs here."""
    for info in polyquant.backends():
        if not issubclass(info.options, PackableOptions):
            continue  # its runtime or its code books have no place there
        handle = polyquant.backend(info.name)
        if problems := handle.problems("cpu"):
            yield LeftOut(name=info.name, reason=problems[0].what)
        elif not info.capabilities.runs_on_torch:
            yield LeftOut(
                name=info.name, reason="its worker would be measured, too: run this script in its environment"
            )
        else:
            for preset, options in info.presets.items():
                yield from _placed(handle, preset, options, model)


def nf4_of_models(
    names: Sequence[str], asked: Asked, cells_of: Callable[[Source, Preset], Iterator[Cell]]
) -> Iterator[Cell | LeftOut]:
    """The cells of random models in NF4. cells_of: a model, and the preset -> its cells."""
    nf4 = packed_preset(NF4)
    if isinstance(nf4, LeftOut):
        yield nf4
        return
    for name in names:
        yield from cells_of(Source(model=name, small=asked.sizes.small), nf4)


def packed_preset(name: str) -> Preset | LeftOut:
    """The one of that name."""
    absent = LeftOut(name=name, reason="its backend is not installed")
    backend, _, _ = name.partition(":")
    found = {each.name: each for each in packed_presets()}
    return found.get(name) or found.get(backend, absent)


def _placed(handle: Backend, preset: str, options: Mapping[str, object], model: str) -> Iterator[Preset | LeftOut]:
    name, bits = f"{handle.name}:{preset}", handle.config(options).level_bits
    if bits not in BITS:
        return
    try:
        config = handle.config({**options, "kernel": PACKED, "compute_dtype": "float32"})
        (plan,) = handle.plan_layers([PROBE], config)
    except PolyquantError as error:
        yield LeftOut(name=name, reason=str(error))
        return
    if plan.packed is None:
        yield LeftOut(name=name, reason=f"{plan.scheme} has no place in the packed layout")
        return
    as_it_loads = handle.capabilities.on_the_fly
    yield Preset(
        name=name, backend=handle.name, bits=int(bits), options=options if as_it_loads else {},
        source=Source(model=model) if as_it_loads else Source(model=model, backend=handle.name, preset=preset),
    )  # fmt: skip
