"""For a backend's own tests: checkpoints that somebody damaged or wrote otherwise, and what a loaded one must show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polyquant
from polyquant.loaded import LoadedModel

Change = Callable[[dict[str, Any]], object]


def changed_copy(checkpoint: Path, out: Path, tensors: Change | None = None, stored: Change | None = None) -> Path:
    """A copy of a checkpoint in the folder `out`, with its tensors and its quantization_config changed in place."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, out, dirs_exist_ok=True)
    if tensors is not None:
        found = load_file(checkpoint / "model.safetensors")
        tensors(found)
        save_file(found, out / "model.safetensors", {"format": "pt"})
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


def assert_verified(loaded: LoadedModel) -> None:
    """Nothing but the sample fails, which random weights cannot speak."""
    failures = [check for check in polyquant.verify(loaded, max_new_tokens=2).failures if check.name != "sample"]
    assert not failures, failures
