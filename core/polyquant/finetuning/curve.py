"""What a run leaves to look at: its steps as CSV, and the loss as an SVG picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import msgspec

from polyquant.finetuning.options import TrainingStep

COLUMNS = ("step", "loss", "evaluation_loss", "learning_rate", "tokens_per_second", "memory_bytes")


def write_steps(steps: Sequence[TrainingStep], path: Path) -> None:
    """One row a step that was shown."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"step": step.done, **msgspec.to_builtins(step)} for step in steps)


def write_curve(steps: Sequence[TrainingStep], path: Path, title: str) -> None:
    """The loss over the steps, evaluation beside it, with matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([step.done for step in steps], [step.loss for step in steps], label="training", color="#2b6cb0")
    evaluated = [step for step in steps if step.evaluation_loss is not None]
    if evaluated:
        values = [step.evaluation_loss for step in evaluated]
        axes.plot([step.done for step in evaluated], values, "o-", label="held out", color="#c05621")
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, format=path.suffix.removeprefix("."))
