"""What the planning commands print."""

from __future__ import annotations

from typing import Any

import msgspec
from rich import box
from rich.table import Table
from rich.text import Text

from polyquant.cli.output import print_json
from polyquant.cli.show import _notes, _pairs, console
from polyquant.cli.terminal import styled
from polyquant.loading.options import LoadOptions
from polyquant.planning.bars import COLOURS, PARTS, Bar, bars_of
from polyquant.planning.records import SHOWN, Foreseen, Plan, Plans, Recommendation
from polyquant.support.sizes import size

LOAD_OPTIONS = frozenset(LoadOptions.__struct_fields__)
SPEED_CELLS = 16  # of two columns
MARKS = {
    "fits": "[green]fits[/]", "too big": "[red]too big[/]", "not planned": "[dim]not planned[/]",
    "does not run": "[dim]does not run[/]", "left out": "[dim]left out[/]",
}  # fmt: skip


def _plan_dict(plan: Plan) -> dict[str, Any]:
    figures = {"ratio": plan.ratio, "fits": plan.fits}
    return {**msgspec.to_builtins(plan), **figures}


def plan_json(plan: Plan) -> None:
    print_json(_plan_dict(plan))


def plans_json(table: Plans) -> None:
    rows = []
    for row in table.rows:
        shown = msgspec.to_builtins(row)
        if row.plan is not None:
            shown["plan"] = {name: value for name, value in _plan_dict(row.plan).items() if name != "tensors"}
        rows.append(shown)
    print_json({**msgspec.to_builtins(table), "rows": rows})


def recommendation_json(found: Recommendation) -> None:
    print_json(found)


def plan(found: Plan, *, layers: bool) -> None:
    context = f"{found.context}" + (f", batch {found.batch}" if found.batch > 1 else "")
    about = (found.model, found.backend, found.compute_dtype, found.device, context)
    console.print(styled("[bold]{}[/] with {}, {} on {}, context {}", *about))
    table, bits = _pairs(), f"{found.bits_per_weight:.2f} bits a weight"
    given_back = (
        f", {size(found.reclaimable_bytes)} of it pages that can be taken back" if found.reclaimable_bytes else ""
    )
    kind = "" if found.kv_cache == "keep" else f", {found.kv_cache}"
    rows = (
        ("weights", f"{size(found.weights_planned_bytes)}, {found.ratio:.2f}x bfloat16"),
        ("  quantized", f"{size(found.quantized_bytes)}, {bits}, {size(found.constant_bytes)} of it constants"),
        ("  dense", size(found.weights_planned_bytes - found.quantized_bytes)),
        ("in bfloat16", size(found.weights_dense_bytes)),
        ("checkpoint now", size(found.checkpoint_bytes) if found.checkpoint_bytes else "no weight files here"),
        (f"key-value cache{kind}", "not counted" if found.kv_cache_bytes is None else size(found.kv_cache_bytes)),
        ("activations", "not counted" if found.activation_bytes is None else size(found.activation_bytes)),
        ("process", size(found.process_bytes)),
        *_disk(found),
        ("load peak", size(found.load_peak_bytes) + given_back),
        ("run peak", size(found.run_peak_bytes)),
        ("needed", f"{size(found.needed_bytes)} of {size(found.memory_bytes)}"),
        *([("foreseen", _foreseen(found.foreseen))] if found.foreseen else []),
    )
    for name, text in rows:
        table.add_row(name, text)
    console.print(table)
    bars = bars_of(found)
    scale, budget = _scale(found, bars, cells := _bar_cells())
    console.print(_bar(bars[0], scale, budget, cells))
    _legend(budget)
    if found.placed:
        _devices(found)
    if layers:
        _layers(found)
    else:
        _largest_dense(found)
    _notes(found.notes)
    fits = found.fits and not found.spilled
    console.print(styled("[green]fits[/]" if fits else "[red]does not fit[/]"))


def _disk(found: Plan) -> list[tuple[str, str]]:
    if not found.on_disk:
        return []
    rate = found.disk_tokens_per_second
    speed = "" if rate is None else f", {rate:.2g} tokens/s by the disk's rate"
    return [("on disk", f"{len(found.on_disk)} blocks, {size(found.read_bytes_per_token)} read for each token{speed}")]


def _foreseen(speed: Foreseen) -> str:
    if speed.why:
        return f"no speed: {speed.why}"
    generated, prompt = _speeds(speed)
    return f"{generated} generated tokens/s, {prompt} of a prompt"


def _devices(found: Plan) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("device", "room", "weights", "modules"):
        table.add_column(heading, overflow="fold")
    for entry in found.placed:
        shown = ", ".join(name or "the whole model" for name in _runs(entry.modules))
        table.add_row(
            entry.device, size(entry.room_bytes) if entry.room_bytes else "-", size(entry.weights_bytes), shown
        )
    console.print(table)


def _runs(modules: tuple[str, ...]) -> list[str]:
    """Names with runs of numbered layers joined: model.layers.0-17."""
    found: list[str] = []
    last: tuple[str, int, int] | None = None
    for name in (*modules, ""):
        stem, _, number = name.rpartition(".")
        if last and number.isdigit() and stem == last[0] and int(number) == last[2] + 1:
            last = (stem, last[1], int(number))
            continue
        if last:
            found.append(f"{last[0]}.{last[1]}" + (f"-{last[2]}" if last[2] > last[1] else ""))
        last = (stem, int(number), int(number)) if number.isdigit() else None
        if name and not last:
            found.append(name)
    return found or ["the whole model"] if modules else ["nothing"]


def _layers(found: Plan) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline")
    for heading in ("tensor", "shape", "now", "then", "bits", "bytes", "constants", "why dense"):
        table.add_column(heading, overflow="fold")
    for tensor in found.tensors:
        shape = "x".join(map(str, tensor.shape))
        table.add_row(
            tensor.name, shape, tensor.dtype, tensor.scheme, f"{tensor.bits:g}", str(tensor.stored_bytes),
            str(tensor.constant_bytes or ""), tensor.reason,
        )  # fmt: skip
    console.print(table)


def _largest_dense(found: Plan) -> None:
    dense = sorted((t for t in found.tensors if not t.quantized and t.stored_bytes), key=lambda t: -t.stored_bytes)
    for tensor in dense[:3]:
        console.print(f"  dense: {tensor.name}, {size(tensor.stored_bytes)}: {tensor.reason}")


def plans(table: Plans) -> None:
    console.print(styled("[bold]{}[/] on {}, {} to spend", table.model, table.device, size(table.memory_bytes)))
    foresees = any(row.plan and row.plan.foreseen for row in table.rows)
    bars = {bar.name: bar for bar in bars_of(table)}
    scale, budget = _scale(table, list(bars.values()), cells := _bar_cells(SPEED_CELLS if foresees else 0))
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold underline")
    speeds = ("tokens/s", "prompt") if foresees else ()
    for heading in ("candidate", "", "weights", "of bf16", "needed", *speeds):
        shown.add_column(heading, no_wrap=True, justify="left" if heading in ("candidate", "") else "right")
    shown.add_column("", no_wrap=True)
    for row in table.rows:
        if (plan := row.plan) is not None and row.status in ("fits", "too big"):
            mark = styled(MARKS[row.status] + ("*" if row.fix else ""))
            figures = (size(plan.weights_planned_bytes), f"{plan.ratio:.2f}x", size(plan.needed_bytes))
            more = _speeds(plan.foreseen) if foresees else ()
            bar = _bar(bars[row.candidate.name], scale, budget, cells)
            shown.add_row(row.candidate.name, mark, *figures, *more, bar)
    console.print(shown)
    _legend(budget)
    if foresees:
        console.print(
            "tokens/s, generated and of prompts of 512, are foreseen; for - a plan with --backend says why not"
        )
    if any(row.fix and row.status == "fits" for row in table.rows):
        console.print("* its checkpoint is made first: polyquant quantize")
    for row in table.rows:
        if row.status not in ("fits", "too big"):
            fix = f" ({row.fix})" if row.fix else ""
            line = styled("[dim]{}[/] {}: {}", row.candidate.name, row.status, row.reason + fix)
            console.print(line, soft_wrap=True)
    for absent in table.absent:
        console.print(styled("[dim]{}[/] not installed: [bold]{}[/]", absent.backend, absent.command))
    _notes(table.notes)
    if not table.fitting and (nearest := table.nearest) is not None:
        told = (nearest.candidate.name, nearest.reason)
        console.print(styled("[red]nothing fits[/]; the nearest is {}: {}", *told))


def _speeds(found: Foreseen | None) -> tuple[str, str]:
    rates = (found.generated_tokens_per_second, found.prompt_tokens_per_second) if found else (None, None)
    generated, prompt = (f"{rate:.0f}" if rate else "-" for rate in rates)
    return generated, prompt


def _bar_cells(others: int = 0) -> int:
    """others: what stands beside, and is not in every table."""
    return max(8, min(40, console.width - 66 - others))


def _scale(what: Plan | Plans, bars: list[Bar], cells: int) -> tuple[int, int | None]:
    """Bytes of a full bar, and the cell of the budget's line; None where it is beyond the right edge."""
    longest = max([*(bar.total_bytes for bar in bars), 1])
    scale = max(longest, min(what.memory_bytes, round(1.5 * longest)))
    return scale, round(cells * what.memory_bytes / scale) if what.memory_bytes <= scale else None


def _bar(bar: Bar, scale: int, budget: int | None, cells: int) -> Text:
    text, ends, done = Text(), 0.0, 0
    for part, count in zip(PARTS, bar.parts, strict=True):
        ends += cells * count / scale
        text += Text("█" * (round(ends) - done), style=COLOURS[part])
        done = round(ends)
    text += Text(" " * max(0, cells + 1 - done))
    return text if budget is None else text[:budget] + Text("┃", style="red") + text[budget + 1 :]


def _legend(budget: int | None) -> None:
    line = Text("  ").join(Text("■ ", style=COLOURS[part]) + Text(part) for part in PARTS)
    console.print(line + Text("  ┃ budget" if budget is not None else "  (the budget is beyond the right edge)"))


def recommendation(found: Recommendation) -> None:
    console.print(styled("[bold]{}[/], goal {}: {}", found.model, found.goal, found.reason))
    for advice in found.advice:
        console.print(f"  {advice}")
    for index, choice in enumerate(found.choices[:SHOWN], start=1):
        told = (index, choice.candidate.name, size(choice.needed_bytes), choice.reason)
        console.print(styled("{}. [bold]{}[/] {}: {}", *told))
        console.print(f"   {choice.command}", soft_wrap=True)
    if len(found.choices) > SHOWN:
        console.print(f"and {len(found.choices) - SHOWN} more (--json)")
    if found.excluded:
        console.print("out:")
    for name, why in found.excluded.items():
        console.print(f"  {name}: {why}")
