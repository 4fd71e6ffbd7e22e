"""The step `doctor`: what machine this is, how busy its GPU is, and what stops each backend on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import common
import polyquant

LIBRARIES = ("polyquant", "torch", "transformers", "accelerate", "triton", "safetensors", "tokenizers", "numpy", "peft")


def measure(arguments: common.Facts, note: common.Note) -> None:
    device = arguments["device"]
    note({"date": arguments["date"], "machine": machine(Path(arguments["work"]))})
    note({"device": gpu(device) if device.startswith("cuda") else {"kind": device, "name": processor()}})
    named = {library.distribution for info in polyquant.backends() for library in info.libraries}
    note({"versions": versions({*LIBRARIES, *named})})
    found = polyquant.backends()
    on_gpus = {info.name: any(each.type == "cuda" for each in info.capabilities.devices) for info in found}
    on_gpus |= {miss.name: True for miss in found.misses if miss.broken}
    note({"backends": on_gpus})  # before they are asked: one whose import ends the process takes no other with it
    diagnoses = []
    for name, declares in on_gpus.items():
        note({"at": name})
        for diagnosis in polyquant.doctor(name, device=device):
            problems = [{"what": each.what, "fix": each.fix, "kind": each.kind} for each in diagnosis.problems]
            diagnoses.append({"backend": name, "on_gpus": declares, "problems": problems})
            note({"diagnoses": diagnoses})


def machine(work: Path) -> common.Facts:
    import psutil

    return {
        "processor": processor(), "cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total,
        "disk_free_bytes": shutil.disk_usage(work).free, "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }  # fmt: skip


def processor() -> str:
    from polyquant.support.machine import this_machine

    return this_machine().processor


def gpu(device: str) -> common.Facts:
    """The GPU. Raises NotRun where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise common.NotRun(
            f"no GPU: torch {torch.__version__} ({built}) sees none. nvidia-smi shows what the driver sees; "
            "without a GPU: --device cpu --small"
        )
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "kind": "cuda", "name": properties.name, "capability": f"{major}.{minor}", "memory_bytes": total,
        "free_bytes": free, "driver": driver(), "cuda": torch.version.cuda,
    }  # fmt: skip


def driver() -> str:
    """The driver's version, from nvidia-smi; empty where that cannot say."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        ended = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.splitlines()[0].strip() if ended.returncode == 0 and ended.stdout else ""


def versions(names: set[str]) -> dict[str, str]:
    found = {}
    for name in sorted(names):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    common.step(measure)
