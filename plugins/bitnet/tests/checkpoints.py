"""BitNet checkpoints of dense models: every matrix below `layers` rounded to -1, 0 and 1 by its mean, and packed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.bitnet import pack_weights


def make(dense: Path, out: Path, linear_class: str = "bitlinear", *, online: bool = False, **config: Any) -> Path:
    """online: the matrices stay dense. config: more of the quantization_config."""
    out.mkdir(parents=True)
    for file in dense.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        tensors[name] = tensor
        if ".layers." in name and tensor.dim() == 2 and ".experts." not in name and not online:
            mean = tensor.float().abs().mean()
            tensors[name] = pack_weights((tensor.float() / mean).round().clamp(-1, 1))
            tensors[f"{name}_scale"] = (mean if linear_class == "autobitlinear" else 1 / mean).reshape(1)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((out / "config.json").read_text())
    mode = "online" if online else "offline"
    settings["quantization_config"] = {
        "quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": mode, **config,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(settings))
    return out
