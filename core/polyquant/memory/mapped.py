"""Dense tensors that a load left in the checkpoint's mapped file, though part of that file is not used any more."""

from __future__ import annotations

from collections.abc import Iterator

import torch

WORTH_KEEPING = 0.9  # share of the file that is still in use


def own_mapped_tensors(model: torch.nn.Module, checkpoint_bytes: int) -> int:
    """Copy what `model` still has in mapped files, where that is a part of them only; returns the bytes copied.

    safetensors maps the file, and a tensor that keeps its dtype on the CPU is a view of it: one embedding keeps every
    page that was read resident. NF4 of SmolLM2-135M holds 108 MB so, and 513 MB of pages with it. A checkpoint that
    is used as it lies in its file stays there: the system can drop those pages and read them again.
    """
    mapped = list(_mapped(model))
    nbytes: int = sum(parameter.numel() * parameter.element_size() for parameter in mapped)
    if not nbytes or nbytes > WORTH_KEEPING * checkpoint_bytes:
        return 0
    for parameter in mapped:
        parameter.data = parameter.data.clone()
    return nbytes


def _mapped(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Plain parameters and buffers on the CPU whose memory is not torch's own: its own can be resized."""
    for tensor in (*model.parameters(), *model.buffers()):
        plain = type(tensor.data) is torch.Tensor and tensor.device.type == "cpu"
        if plain and not tensor.untyped_storage().resizable():
            yield tensor
