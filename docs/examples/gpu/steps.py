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
NO_DIRECT = {
    "fp8:block128": "transformers' own fp8 fetches its kernel from a hub at run time",
    "gguf:Q4_0": "transformers dequantizes GGUF files: it has no packed weights to time",
}
"""Candidates whose library cannot be timed alone, and why."""
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
    never: str = ""  # why it is not run anywhere


def sizes(free_bytes: int, disk_bytes: int, *, small: bool) -> tuple[list[str], str]:
    """The models that there is room for, the smaller first, and in a sentence what there is no room for.

    Where there is room for none it is the tiny one, whose own step looks at the disk.
    """
    wanted = ["tiny"] if small else ["1b", "8b"]
    fitting = [size for size in wanted if free_bytes >= ROOM[size][0] and disk_bytes >= ROOM[size][1]]
    missing = [
        f"the {size} needs {gib(ROOM[size][0])} of the device and {gib(ROOM[size][1])} of the disk"
        for size in wanted if size not in fitting
    ]  # fmt: skip
    there = f"; free are {gib(free_bytes)} and {gib(disk_bytes)}" if missing else ""
    return fitting or ["tiny"], "; ".join(missing) + there


def busy(free_bytes: int, total_bytes: int) -> str:
    """A sentence where others use the device; empty where it is free."""
    taken = total_bytes - free_bytes
    if taken <= BUSY_SHARE * total_bytes:
        return ""
    return f"the GPU is busy: {gib(taken)} of {gib(total_bytes)} are taken by others, so speeds here are not its own"


def steps(backends: list[str], chosen: list[str], *, device: str, small: bool, work: Path) -> list[Step]:
    """All steps after the doctor's: models and conformance, then what is timed, the libraries alone at the end."""
    common = {"device": device, "small": small, "work": str(work)}
    first, *others = chosen
    listed = [_model(size, common, work) for size in chosen]
    listed += [
        Step(f"conformance:{backend}", "conformance", {**common, "backend": backend}, 110.0, 2, together=True,
             backend=backend)
        for backend in backends
    ]  # fmt: skip
    listed += [_dense(first, common, work), *_candidate(CANDIDATES[0], first, common, work)]
    listed += [_direct(CANDIDATES[0], first, common, work)]
    listed += [_training(first, common, work), _placing("auto", first, common, work)]
    if not others:
        listed.append(_placing("budget", first, common, work))
    for candidate in CANDIDATES[1:]:
        listed += _candidate(candidate, first, common, work)
    for size in others:
        listed += [_dense(size, common, work), *_candidate(LARGE[0], size, common, work)]
        listed += [_placing("budget", size, common, work), _training(size, common, work)]
        for candidate in LARGE[1:]:
            listed += _candidate(candidate, size, common, work)
    listed += [_direct(candidate, first, common, work) for candidate in CANDIDATES[1:]]
    return listed


def _with_model(size: str, common: dict[str, Any], work: Path) -> dict[str, Any]:
    return {**common, "size": size, "model": str(work / f"llama-{size}")}


def _model(size: str, common: dict[str, Any], work: Path) -> Step:
    return Step(f"model:{size}", "model", _with_model(size, common, work), 150.0, 0, together=True)


def _dense(size: str, common: dict[str, Any], work: Path) -> Step:
    return Step(f"dense@{size}", "dense", _with_model(size, common, work), 90.0, 1, after=(f"model:{size}",))


def _candidate(name: str, size: str, common: dict[str, Any], work: Path) -> list[Step]:
    """The candidate, before it its checkpoint where it needs one."""
    backend, arguments = name.partition(":")[0], _with_checkpoint(name, size, common, work)
    if name not in FROM_CHECKPOINT:
        return [Step(f"{name}@{size}", "candidate", arguments, 75.0, after=(f"model:{size}",), backend=backend)]
    made = f"checkpoint:{name}@{size}"
    return [
        Step(made, "checkpoint", arguments, 60.0, 2, after=(f"model:{size}",), backend=backend),
        Step(f"{name}@{size}", "candidate", arguments, 75.0, after=(made,), backend=backend),
    ]


def _direct(name: str, size: str, common: dict[str, Any], work: Path) -> Step:
    """The candidate's library alone."""
    after = f"checkpoint:{name}@{size}" if name in FROM_CHECKPOINT else f"model:{size}"
    arguments, backend = _with_checkpoint(name, size, common, work), name.partition(":")[0]
    return Step(f"{name}@{size} direct", "direct", arguments, 60.0, after=(after,), backend=backend,
                never=NO_DIRECT.get(name, ""))  # fmt: skip


def _with_checkpoint(name: str, size: str, common: dict[str, Any], work: Path) -> dict[str, Any]:
    checkpoint = work / f"{name.replace(':', '-')}-{size}"
    return {**_with_model(size, common, work), "candidate": name, "checkpoint": str(checkpoint)}


def _training(size: str, common: dict[str, Any], work: Path) -> Step:
    arguments = _with_model(size, common, work)
    return Step(f"qlora@{size}", "training", arguments, 75.0, after=(f"model:{size}",), backend="bitsandbytes")


def _placing(way: str, size: str, common: dict[str, Any], work: Path) -> Step:
    arguments = {**_with_model(size, common, work), "way": way}
    return Step(f"{way}@{size}", "placing", arguments, 75.0, after=(f"dense@{size}",), backend="bitsandbytes")


def gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
