"""For a backend's own tests: checkpoints that somebody damaged or wrote otherwise, and what a loaded one must show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polyquant
from polyquant.loaded import LoadedModel

Change = Callable[[dict[str, Any]], object]


def changed_copy(checkpoint: Path, out: Path, tensors: Change | None = None, stored: Change | None = None) -> Path:
    """A copy of a checkpoint in the folder `out`, with its tensors and its quantization_config changed in place."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, out, dirs_exist_ok=True)
    if tensors is not None:
        (path,) = checkpoint.glob("*.safetensors")
        found = load_file(path)
        tensors(found)
        with safe_open(path, framework="pt") as file:
            save_file(found, out / path.name, file.metadata())
    if stored is not None:
        config = json.loads((checkpoint / "config.json").read_text())
        stored(config["quantization_config"])
        (out / "config.json").write_text(json.dumps(config))
    return out


def without(name: str) -> Change:
    """Takes a tensor out."""
    return lambda tensors: tensors.pop(name)


def replaced(name: str, how: Callable[[Any], Any]) -> Change:
    """Puts what `how` makes of a tensor in its place."""
    return lambda tensors: tensors.update({name: how(tensors[name])})


def put(given: Mapping[str, Any]) -> Change:
    """Puts tensors in, by their names; None takes one out."""

    def change(tensors: dict[str, Any]) -> None:
        for name, tensor in given.items():
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor

    return change


def adapter_gradients(model: Any, tokens: Sequence[int]) -> dict[str, Any]:
    """Name -> gradient of what is trained where LoRA adapters, with values that are the same each time, are put on."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapters = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted, ids = get_peft_model(model, adapters).train(), torch.tensor([list(tokens)])
    adapted(input_ids=ids, labels=ids).loss.backward()
    return {name: value.grad for name, value in adapted.named_parameters() if value.grad is not None}


def assert_verified(loaded: LoadedModel) -> None:
    """Nothing but the sample fails, which random weights cannot speak."""
    failures = [check for check in polyquant.verify(loaded, max_new_tokens=2).failures if check.name != "sample"]
    assert not failures, failures
