"""The commands that say what a model takes before it is loaded, and which way to take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import polyquant
from polyquant.cli.arguments import Json, Loading, Model
from polyquant.cli.output import say

Memory = Annotated[
    str | None, typer.Option(help="The budget, such as 6GiB; what is free on the device where left out.")
]
Context = Annotated[int, typer.Option(help="Tokens of the key-value cache.", min=1)]
Batch = Annotated[int, typer.Option(help="Sequences at once.", min=1)]
Speed = Annotated[
    bool, typer.Option("--speed", help="Foresee tokens a second, on random weights: some seconds a candidate, once.")
]


def plan(
    model: Model,
    loading: Loading,
    memory: Memory = None,
    context: Context = 4096,
    batch: Batch = 1,
    devices: Annotated[
        str | None, typer.Option(help="Devices that need not be here, as in 'cuda:0=24GiB,cuda:1=24GiB,cpu=64GiB'.")
    ] = None,
    speed: Speed = False,
    tensors: Annotated[bool, typer.Option("--layers", help="Every tensor, not only the totals.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the picture to this .svg, .html, .png or .pdf file.", dir_okay=False)
    ] = None,
    json: Json = False,
) -> None:
    """What a model takes, from its headers or its config.json alone: nothing is loaded. Exit code 1 where nothing fits.

    With --backend its plan, tensor by tensor; without, a table of every installed backend's presets.

    Examples: polyquant plan builtin:smollm2 --memory 1GiB ·
    polyquant plan MODEL -b bitsandbytes --bits 4 --context 8192 ·
    polyquant plan MODEL -b bitsandbytes --devices "cuda:0=24GiB,cpu=64GiB"
    """
    from polyquant.cli import show_plans as show
    from polyquant.cli.show import loading as waiting
    from polyquant.loading.emulation import require_none

    shared: dict[str, Any] = {
        "context": context, "batch": batch, "kv_cache": loading.options["kv_cache"], "memory": memory,
        "devices": devices, "revision": loading.revision, "speed": speed,
        "device": loading.options["device"], "trust_remote_code": loading.options["trust_remote_code"],
    }  # fmt: skip
    require_none(loading.options["emulate_activations"], "plan")
    own = {name: value for name, value in loading.options.items() if name not in show.LOAD_OPTIONS}
    if loading.backend is None:
        with waiting(_said(model, speed)):
            table = polyquant.plan(model, **shared)
        _draw(out, table)
        show.plans_json(table) if json else show.plans(table)
        fits = bool(table.fitting)
    else:
        with waiting(_said(model, speed)):
            found = polyquant.plan(model, loading.backend, offload=loading.options["offload"], **shared, **own)
        _draw(out, found)
        show.plan_json(found) if json else show.plan(found, layers=tensors)
        fits = found.fits and (not found.spilled or loading.options["offload"] == "cpu")
    if not fits:
        raise typer.Exit(1)


def recommend(
    model: Model,
    memory: Memory = None,
    goal: Annotated[
        Literal["quality", "speed", "memory"], typer.Option(help="What matters most among what fits.")
    ] = "quality",
    needs: Annotated[
        str, typer.Option(help="Abilities it must have, as in 'trains,saves'.", autocompletion=lambda: [*_abilities()])
    ] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, xpu, mps; auto: the fastest here.")] = "auto",
    context: Context = 4096,
    batch: Batch = 1,
    comparisons: Annotated[
        Path | None, typer.Option(help="Folder of comparisons measured here; polyquant's own where left out.")
    ] = None,
    speed: Speed = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub repository.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the picture to this .svg, .html, .png or .pdf file.", dir_okay=False)
    ] = None,
    json: Json = False,
) -> None:
    """The best backend and preset for a model, a budget and a goal, with the reason; and why each other one is out.

    Examples: polyquant recommend builtin:smollm2 --memory 1GiB ·
    polyquant recommend MODEL --goal speed --needs trains --device cpu
    """
    from polyquant.cli import show_plans as show
    from polyquant.cli.show import loading as waiting

    wanted = [word.strip() for word in needs.split(",") if word.strip()]
    with waiting(_said(model, speed)):
        found = polyquant.recommend(
            model, memory=memory, goal=goal, needs=wanted, device=device, context=context, batch=batch,
            comparisons=comparisons, revision=revision, speed=speed,
        )  # fmt: skip
    if out is not None:
        _draw(out, polyquant.plan(model, memory=memory, device=device, context=context, batch=batch, revision=revision))
    show.recommendation_json(found) if json else show.recommendation(found)
    if found.best is None:
        raise typer.Exit(1)


def _said(model: str, speed: bool) -> str:
    return f"{model}; speeds take some seconds a candidate, once" if speed else model


def _abilities() -> tuple[str, ...]:
    from polyquant.planning.recommend import ABILITIES

    return ABILITIES


def _draw(out: Path | None, what: Any) -> None:
    if out is None:
        return
    from polyquant.planning.picture import draw
    from polyquant.support.pictures import require_suffix

    require_suffix(out, ".html")
    draw(what, out)
    say(f"wrote {out}", error=True)
