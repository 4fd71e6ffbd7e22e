"""What the commands print: tables for people, JSON for scripts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
from rich import box
from rich.table import Table

from polyquant.cli.output import print_json, say
from polyquant.cli.terminal import Terminal, styled
from polyquant.support.sizes import size

if TYPE_CHECKING:
    from pathlib import Path

    from polyquant.finetuning.options import Tuned
    from polyquant.isolated.doctor import Diagnosis
    from polyquant.loaded import LoadedModel
    from polyquant.loading.records import Verification
    from polyquant.measure.quality.records import Quality

console = Terminal()


def doctor(diagnoses: Sequence[Diagnosis]) -> None:
    from polyquant.packed_weights import kernels

    if not diagnoses:
        console.print("No backend is installed. Try: pip install polyquant-bitsandbytes")
    for diagnosis in diagnoses:
        mark = "[green]runs[/]" if diagnosis.runs else "[red]does not run[/]"
        where = f" in environment {diagnosis.environment}" if diagnosis.environment and diagnosis.runs else ""
        about = (diagnosis.backend, diagnosis.origin, diagnosis.device)
        console.print(styled(f"[bold]{{}}[/] ({{}}) on {{}}: {mark}{{}}", *about, where))
        _notes(diagnosis.notes)
        for problem in diagnosis.problems:
            console.print(styled("  - {}\n    fix: [bold]{}[/]", problem.what, problem.fix))
            if problem.detail:
                console.print(f"    {problem.detail.strip()}", style="dim")
    console.print(kernels.told(), style="dim")


@contextmanager
def loading(model: str, *, bars: bool = False) -> Iterator[None]:
    """A spinner on standard error where it is a terminal; bars: a line, since libraries draw bars there."""
    if not sys.stderr.isatty():
        yield
    elif bars:
        say(f"loading {model}", error=True)
        yield
    else:
        with Terminal(stderr=True).status(styled("loading {}", model)):
            yield


def loaded_json(model: LoadedModel) -> None:
    print_json(_summary(model))


def _summary(model: LoadedModel) -> dict[str, object]:
    layers = model.initial_layers
    return {
        "backend": model.backend.name,
        "config": msgspec.to_builtins(model.config),
        "kernel": model.kernel,
        "emulated_activations": model.emulated_activations,
        "device_map": dict(model.request.device_map) if model.request else {},
        "weights_stored_bytes": sum(layer.stored_bytes for layer in layers),
        "quantized_tensors": sum(layer.quantized for layer in layers),
        "dense_tensors": sum(not layer.quantized for layer in layers),
        "hooks": list(model.records),
        "notes": model.notes,
    }


def loaded(model: LoadedModel) -> None:
    summary = _summary(model)
    table = _pairs()
    options = ", ".join(
        f"{name}={value}" for name, value in msgspec.to_builtins(model.config).items() if value is not None
    )
    table.add_row("backend", f"{summary['backend']} ({model.kernel})")
    table.add_row("options", options)
    table.add_row("weights stored", size(sum(layer.stored_bytes for layer in model.initial_layers)))
    table.add_row("tensors", f"{summary['quantized_tensors']} quantized, {summary['dense_tensors']} dense")
    for record in model.records:
        table.add_row(f"{record.hook} hook", f"{record.seconds:.1f} s, peak {size(record.peak_bytes)}")
    console.print(table)
    _notes(model.notes)


def verification_json(report: Verification) -> None:
    memory = report.memory
    ratios = {
        "ratio_to_checkpoint": memory.ratio_to_checkpoint,
        "ratio_to_bfloat16": memory.ratio_to_bfloat16,
        "quantized_ratio_to_bfloat16": memory.quantized_ratio_to_bfloat16,
        "quantized_bits_per_weight": memory.quantized_bits_per_weight,
    }
    print_json({"passed": report.passed, **msgspec.to_builtins(report), "ratios": ratios})


def verification(report: Verification) -> None:
    memory = report.memory
    about = (report.model, report.backend, report.kernel, report.compute_dtype, report.device)
    console.print(styled("[bold]{}[/] with {} ({}), {} on {}", *about))
    table = _pairs()
    rows = (
        ("weights planned", memory.weights_planned_bytes),
        ("weights stored", memory.weights_stored_bytes),
        ("weights by transformers' count", memory.weights_reported_bytes),
        ("weights after a forward pass", memory.weights_after_forward_bytes),
        ("checkpoint on disk", memory.checkpoint_bytes),
        ("load peak", memory.load_peak_bytes),
        ("run peak", memory.run_peak_bytes),
        ("key-value cache a token", memory.kv_cache_bytes_per_token),
    )
    for name, count in rows:
        table.add_row(name, size(count))
    table.add_row(
        "quantized layers",
        f"{memory.quantized_bits_per_weight:.2f} bits a weight, {memory.quantized_ratio_to_bfloat16:.2f}x bfloat16",
    )
    ratios = f"{memory.ratio_to_bfloat16:.2f}x bfloat16, {memory.ratio_to_checkpoint:.2f}x the checkpoint"
    table.add_row("whole model", ratios)
    if report.emulated_activations:
        table.add_row("activations", f"{report.emulated_activations}, emulated: speed and memory are not the format's")
    table.add_row("load", f"{report.load_seconds:.1f} s")
    table.add_row("sample", report.sample.text.strip().replace("\n", " "))
    console.print(table)
    checks = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "check", "found"):
        checks.add_column(heading, overflow="fold")
    for check in report.checks:
        found = check.found if check.passed else f"{check.found} (expected: {check.expected})"
        checks.add_row(styled("[green]pass[/]" if check.passed else "[red]FAIL[/]"), check.name, found)
    console.print(checks)
    _notes(report.notes)
    console.print(styled("[green]verified[/]" if report.passed else "[red]verification failed[/]"))


def tuned(run: Tuned, command: str) -> None:
    """command: runs the model with the adapter."""
    table = _pairs()
    table.add_row("adapter", f"{run.adapter} ({size(run.adapter_bytes)})")
    table.add_row(
        "steps", f"{run.steps}" + (f", gone on with from step {run.resumed_from}" if run.resumed_from else "")
    )
    table.add_row("loss", f"{run.first_loss:.3f} -> {run.last_loss:.3f}")
    if run.evaluation_loss is not None:
        table.add_row("held-out loss", f"{run.evaluation_loss:.3f}")
    table.add_row(
        "trained", f"{run.trained_parameters:,} parameters in {run.seconds:.0f} s, peak {size(run.peak_bytes)}"
    )
    console.print(table)
    _notes(run.notes)
    console.print(f"use it: {command}", soft_wrap=True, markup=False, highlight=False)


def merged(out: Path, quality: Quality) -> None:
    console.print(
        f"wrote {out}: KL {quality.kl_mean:.4f} ± {quality.kl_standard_error:.4f} nats to base and adapter, "
        f"same first token in {quality.top1:.1%} of {quality.tokens_scored} positions"
    )


def _pairs() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    return table


def _notes(notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"note: {note}")
