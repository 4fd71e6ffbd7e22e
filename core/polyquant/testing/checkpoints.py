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


FLOAT16_AT = {  # byte positions of float16 fields, which random bytes would make NaN or infinite
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": (), "IQ1_M": (),
}  # fmt: skip


LEFT_OUT = ("general.architecture", "general.file_type", "polyquant.options")  # written anew, or of another file
MODERATE = {"MXFP4": (1, 112, 8), "NVFP4": (4, 8, 16)}
"""kind -> how many bytes at the start are scales, the least of those that models have, how many: others overflow."""


def random_blocks(kind: str, count: int) -> Any:
    """GGUF blocks of random bytes whose values are finite, so that every field takes every value: (count, bytes)."""
    import numpy as np

    from polyquant.plugin.gguf import TYPES

    rng = np.random.default_rng(7)
    blocks = rng.integers(0, 256, (count, TYPES[kind].nbytes), dtype=np.uint8)
    for at in FLOAT16_AT.get(kind, (0,)):
        blocks[:, at : at + 2] = rng.normal(0, 0.02, (count, 1)).astype(np.float16).view(np.uint8)
    if kind == "IQ1_M":
        blocks[:, 55] &= 0x3F  # top nibble of the scale: no infinities
    if kind == "MXFP4":
        blocks[:, 0] %= 240  # an exponent; beyond, the reference overflows
    return blocks


def in_blocks_of(kind: str, path: Path, out: Path) -> Path:
    """A copy of a GGUF, in the folder `out`, in which the matrices of its layers are random blocks of another type."""
    import gguf

    from polyquant.plugin.gguf import TYPES

    reader, block = gguf.GGUFReader(path), TYPES[kind]
    out.mkdir(parents=True)
    writer = gguf.GGUFWriter(out / f"{kind}.gguf", reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name not in LEFT_OUT and not field.name.startswith("GGUF."):
            writer.add_key_value(field.name, field.contents(), *field.types[:2])
    writer.add_file_type(next(each for each in gguf.LlamaFileType if each.name.startswith(f"MOSTLY_{kind}")))
    for tensor in reader.tensors:
        data, stored_as = tensor.data, tensor.tensor_type
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            columns, rows = (int(size) for size in tensor.shape)
            data = random_blocks(kind, rows * columns // block.elements)
            if kind in MODERATE:
                count, least, values = MODERATE[kind]
                data[:, :count] = data[:, :count] % values + least
            data = data.reshape(rows, -1)
            stored_as = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(tensor.name, data, raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
