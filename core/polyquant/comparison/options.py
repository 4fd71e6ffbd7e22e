"""How to compare."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from polyquant.comparison.records import Part

EngineName = Literal["local", "ray"]
NOT_MEASURED = ("jobs", "retry", "engine", "address", "emulate_activations", "behaviour")
"""Options that change no figure of a candidate, or that say what its name or `parts` say too."""


class CompareOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to measure, on what, and how; the defaults take a few minutes a candidate for a small model on a CPU."""

    parts: Annotated[
        tuple[Part, ...], Meta(description="what to measure: quality, speed, tasks, behaviour", min_length=1)
    ] = (
        "quality",
        "speed",
    )
    device: Annotated[str, Meta(description="cpu, cuda, xpu, mps; auto: the fastest each backend supports")] = "auto"
    preset: Annotated[
        str, Meta(description="convention of the quality measurement: llamacpp-512, gptq-2048, hf-stride-512")
    ] = "llamacpp-512"
    text: Annotated[
        str, Meta(description="text file or name of a dataset; empty: the novel that comes with polyquant")
    ] = ""
    windows: Annotated[int, Meta(description="windows of text at most; 0: all of it", ge=0)] = 16
    reference: Annotated[
        str, Meta(description="candidate that the others are compared with, or a folder of stored log-probabilities")
    ] = "dense"
    tasks: Annotated[tuple[str, ...], Meta(description="tasks of lm-eval")] = ()
    task_folder: Annotated[str, Meta(description="folder with lm-eval tasks of your own")] = ""
    task_limit: Annotated[int, Meta(description="examples of each task at most; 0: all", ge=0)] = 0
    behaviour: Annotated[
        bool, Meta(description="64 prompts too, answered greedily beside the reference; or name it among parts")
    ] = False
    jobs: Annotated[int, Meta(description="quality cells at a time; speed is always measured alone", ge=1)] = 1
    timeout_seconds: Annotated[float, Meta(description="seconds a cell may take", gt=0)] = 3600
    speed_limit_seconds: Annotated[
        float, Meta(description="seconds of repetitions, prompts and generation each", gt=0)
    ] = 30
    retry: Annotated[bool, Meta(description="measure failed cells again")] = False
    emulate_activations: Annotated[
        bool,
        Meta(description="round activations of every candidate as its format's kernels do; of one: backend:preset,"
             "emulate_activations=true"),
    ] = False  # fmt: skip
    engine: Annotated[EngineName, Meta(description="where cells run: local, or a ray cluster")] = "local"
    address: Annotated[str, Meta(description="of the ray cluster; empty: one on this machine")] = ""

    def __post_init__(self) -> None:
        if self.tasks and "tasks" not in self.parts:
            msgspec.structs.force_setattr(self, "parts", (*self.parts, "tasks"))
        if self.behaviour and "behaviour" not in self.parts:
            msgspec.structs.force_setattr(self, "parts", (*self.parts, "behaviour"))
        if "tasks" in self.parts and not self.tasks:
            raise ValueError("parts has tasks, and no task is named: give tasks (--tasks)")


def command_line(model: str, candidates: Sequence[str], options: CompareOptions) -> str:
    """The command line that measures these candidates in this way."""
    words = ["polyquant", "compare", model]
    for candidate in candidates:
        words += ["-c", candidate]
    default = CompareOptions()
    for name in CompareOptions.__struct_fields__:
        value = getattr(options, name)
        if value == getattr(default, name) or name in NOT_MEASURED:
            continue
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)
