"""The step `doctor`: what machine this is, how busy its GPU is, and what stops each backend on it."""

from __future__ import annotations

import shutil
import subprocess

import common
import polyquant
from msgspec.structs import asdict
from polyquant.support.machine import this_machine

LIBRARIES = ("triton", "safetensors", "tokenizers", "numpy", "peft")
"""Whose versions are told besides those of the core's own libraries and of the backends'."""


def measure(arguments: common.Facts, note: common.Note) -> None:
    device = arguments["device"]
    found = polyquant.backends()
    named = {library.distribution for info in found for library in info.libraries}
    machine = asdict(this_machine(sorted({*LIBRARIES, *named})))
    machine["disk_free_bytes"] = shutil.disk_usage(arguments["work"]).free
    note({"versions": machine.pop("versions"), "machine": machine})
    note({"device": gpu(device) if device.startswith("cuda") else {"kind": device, "name": machine["processor"]}})
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


if __name__ == "__main__":
    common.step(measure)
