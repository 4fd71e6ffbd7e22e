"""What a figure was measured on: processor, memory, system, versions. Imports nothing heavy."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path

from polyquant.support.libraries import installed_version
from polyquant.types import Record

CORE_LIBRARIES = ("polyquant", "torch", "transformers", "accelerate")


class Machine(Record, frozen=True):
    """A machine and its software, as far as they decide speed and memory."""

    processor: str
    cores: int  # usable by this process
    memory_bytes: int
    system: str
    python: str
    versions: dict[str, str]  # distribution -> version
    accelerators: tuple[str, ...] = ()  # models of the GPUs


def this_machine(libraries: Iterable[str] = ()) -> Machine:
    """This machine, with the versions of polyquant's own libraries and of `libraries` that are installed."""
    import psutil

    names = dict.fromkeys((*CORE_LIBRARIES, *libraries))
    versions = {name: version for name in names if (version := installed_version(name))}
    return Machine(
        processor=_processor(),
        cores=len(usable_cores()),
        memory_bytes=psutil.virtual_memory().total,
        system=platform.platform(terse=True),
        python=platform.python_version(),
        versions=versions,
        accelerators=_accelerators(),
    )


def usable_cores() -> set[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _accelerators() -> tuple[str, ...]:
    """Names of NVIDIA GPUs, from the driver's files: this must not import torch."""
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = (line.partition(":") for card in cards for line in card.read_text().splitlines())
    return tuple(value.strip() for name, _, value in lines if name.strip() == "Model")


def _processor() -> str:
    """The model's name; on Linux with the widest vector instructions, which decide which kernels run."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    rows = (line.partition(":") for line in info.read_text().splitlines())
    fields = {name.strip(): value.strip() for name, _, value in rows}
    flags = set(fields.get("flags", "").split())
    widest = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags][:1]
    return " ".join([fields.get("model name") or platform.machine(), *(f"({name})" for name in widest)])
