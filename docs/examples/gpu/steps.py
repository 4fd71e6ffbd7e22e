"""Which steps there are, in the order of their worth, for a machine and its room."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CANDIDATES = (
    "bitsandbytes:nf4", "bitsandbytes:int8", "hqq:int4", "torchao:int8", "fp8:block128", "compressed-tensors:int4",
    "gguf:Q4_0", "quanto:int8", "bitsandbytes:nf4-dq", "gptq:int4", "awq:int4",
)  # fmt: skip
LARGE = ("bitsandbytes:nf4", "bitsandbytes:int8", "fp8:block128", "torchao:int8", "hqq:int4")
"""Candidates that the 8B is loaded with: all quantize while loading."""
FROM_CHECKPOINT = ("compressed-tensors:int4", "gptq:int4", "awq:int4")
ROOM = {"tiny": (2**28, 2**28), "1b": (6 * 2**30, 8 * 2**30), "8b": (24 * 2**30, 20 * 2**30)}
"""size -> bytes that must be free on the device, and on the disk."""
BUSY_SHARE = 0.1  # of the device's memory: more than that taken by others, and speeds are not its own


@dataclass(frozen=True)
class Step:
    """One process."""

    name: str
    script: str  # of the folder gpu/
    arguments: dict[str, Any] = field(default_factory=dict)
    limit_seconds: float = 60.0
    phase: int = 3  # of a rehearsal, in which all steps of a phase run beside each other
    together: bool = False  # whether it may run beside others that may: nothing of it is timed
    after: tuple[str, ...] = ()  # steps that must be done before it
    backend: str = ""  # what the doctor must have found nothing wrong with


def sizes(free_bytes: int, disk_bytes: int, *, small: bool) -> tuple[list[str], str]:
    """The models that there is room for, the smaller first, and in a sentence what there is no room for."""
    wanted = ["tiny"] if small else ["1b", "8b"]
    fitting = [size for size in wanted if free_bytes >= ROOM[size][0] and disk_bytes >= ROOM[size][1]]
    missing = [
        f"the {size} needs {_gib(ROOM[size][0])} of the device and {_gib(ROOM[size][1])} of the disk"
        for size in wanted if size not in fitting
    ]  # fmt: skip
    if not fitting and not small:
        fitting = ["tiny"]
    there = f"; free are {_gib(free_bytes)} and {_gib(disk_bytes)}" if missing else ""
    return fitting, "; ".join(missing) + there


def busy(free_bytes: int, total_bytes: int) -> str:
    """A sentence where others use the device; empty where it is free."""
    taken = total_bytes - free_bytes
    if taken <= BUSY_SHARE * total_bytes:
        return ""
    return f"the GPU is busy: {_gib(taken)} of {_gib(total_bytes)} are taken by others, so speeds here are not its own"


def steps(backends: list[str], chosen: list[str], *, device: str, small: bool, work: Path) -> list[Step]:
    """All steps after the doctor's: conformance, then the models in `chosen`."""
    common = {"device": device, "small": small, "work": str(work)}
    first, *others = chosen
    listed = [_model(first, common, work)]
    listed += [
        Step(f"conformance:{backend}", "conformance", {**common, "backend": backend}, 110.0, 2, together=True,
             backend=backend)
        for backend in backends
    ]  # fmt: skip
    listed += [_dense(first, common, work)]
    for candidate in CANDIDATES:
        listed += _candidate(candidate, first, common, work, direct=True)
    listed += [_training(first, common, work), _placing("auto", first, common, work)]
    if not others:
        listed.append(_placing("budget", first, common, work))
    for size in others:
        listed += [_model(size, common, work), _dense(size, common, work), *_candidate(LARGE[0], size, common, work)]
        listed.append(_placing("budget", size, common, work))
        for candidate in LARGE[1:]:
            listed += _candidate(candidate, size, common, work)
        listed.append(_training(size, common, work))
    return listed


def _with_model(size: str, common: dict[str, Any], work: Path) -> dict[str, Any]:
    return {**common, "size": size, "model": str(work / f"llama-{size}")}


def _model(size: str, common: dict[str, Any], work: Path) -> Step:
    return Step(f"model:{size}", "model", _with_model(size, common, work), 150.0, 0)


def _dense(size: str, common: dict[str, Any], work: Path) -> Step:
    return Step(f"dense@{size}", "dense", _with_model(size, common, work), 90.0, 1, after=(f"model:{size}",))


def _candidate(name: str, size: str, common: dict[str, Any], work: Path, *, direct: bool = False) -> list[Step]:
    """The candidate itself, before it its checkpoint where it needs one, after it the library alone."""
    backend = name.partition(":")[0]
    checkpoint = work / f"{name.replace(':', '-')}-{size}"
    arguments = {**_with_model(size, common, work), "candidate": name, "checkpoint": str(checkpoint)}
    listed, after = [], (f"model:{size}",)
    if name in FROM_CHECKPOINT:
        made = f"checkpoint:{name}@{size}"
        listed.append(Step(made, "checkpoint", arguments, 60.0, 2, after=after, backend=backend))
        after = (made,)
    listed.append(Step(f"{name}@{size}", "candidate", arguments, 75.0, after=after, backend=backend))
    if direct:
        listed.append(Step(f"{name}@{size} direct", "direct", arguments, 60.0, after=after, backend=backend))
    return listed


def _training(size: str, common: dict[str, Any], work: Path) -> Step:
    arguments = _with_model(size, common, work)
    return Step(f"qlora@{size}", "training", arguments, 75.0, after=(f"model:{size}",), backend="bitsandbytes")


def _placing(way: str, size: str, common: dict[str, Any], work: Path) -> Step:
    arguments = {**_with_model(size, common, work), "way": way}
    return Step(f"{way}@{size}", "placing", arguments, 75.0, after=(f"dense@{size}",), backend="bitsandbytes")


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
