"""Devices that torch can use here, and why a backend cannot run on one. Imports torch where it looks."""

from __future__ import annotations

from polyquant.types import Capabilities, Problem


def available_devices() -> list[str]:
    """Devices torch can use here, fastest kind first; `cpu` is always last."""
    import torch

    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        devices += [f"xpu:{index}" for index in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [*devices, "cpu"]


def choose_device(device: str, capabilities: Capabilities) -> str:
    """`device` itself, or for 'auto' the fastest kind here that the backend supports.

    A kind without an index, such as cuda, stands for all devices of that kind.
    """
    if device != "auto":
        return device
    supported = {support.type for support in capabilities.devices}
    kinds = (name.partition(":")[0] for name in available_devices())
    return next((kind for kind in kinds if kind in supported), "cpu")


def device_problems(device: str, capabilities: Capabilities) -> list[Problem]:
    """Why a backend with these capabilities cannot run on `device` here."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        what, fix = f"{device!r} is no device name", f"use one of {', '.join(available_devices())}"
        return [Problem(what=what, fix=fix, kind="device")]
    supported = {support.type: support for support in capabilities.devices}
    if kind not in supported:
        offered = ", ".join(str(support) for support in capabilities.devices)
        return [Problem(what=f"it does not run on {kind}", fix=f"use one of {offered}", kind="device")]
    here = available_devices()
    if not any(name == device or name.partition(":")[0] == device for name in here):
        what = f"device {device} is not there; available: {', '.join(here)}"
        fix = "choose an available device (--device auto), or install a torch build and driver for it"
        return [Problem(what=what, fix=fix, kind="device")]
    least = supported[kind].minimum_capability
    if kind == "cuda" and least and (has := torch.cuda.get_device_capability(device)) < least:
        what = f"{device} has compute capability {has[0]}.{has[1]}, {least[0]}.{least[1]} is needed"
        return [Problem(what=what, fix="use a newer GPU, or --device cpu", kind="device")]
    return []
