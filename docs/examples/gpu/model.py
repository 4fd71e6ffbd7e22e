"""The step `model:SIZE`: a Llama-shaped model of random weights, made on the device and saved in bfloat16.

Matrices are scaled so that the logits spread like those of a real model: noise of quantization shows in them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import common
from steps import gib

SIZES: dict[str, common.Facts] = {
    "tiny": {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
    },
    "1b": {  # as Llama 3.2 1B
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "8b": {  # as Llama 3.1 8B
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip
CHECKPOINT_BYTES = {"tiny": 4 * 10**6, "1b": 2_480_000_000, "8b": 16_070_000_000}  # about
SHARD_BYTES = 2 * 2**30
LOGITS_SPREAD = 2.0
WRITTEN = "model.safetensors.index.json"  # comes last: a folder that has it is whole


def measure(arguments: common.Facts, note: common.Note) -> None:
    size, folder = arguments["size"], Path(arguments["model"])
    if (folder / WRITTEN).exists():
        note({"made": "before"})
        return
    free = shutil.disk_usage(folder.parent).free
    needed = room_for(size)
    if free < needed:
        raise common.NotRun(f"its checkpoints need {gib(needed)}, and {gib(free)} are free at {folder.parent}")
    note({"disk_free_bytes": free})
    shutil.rmtree(folder, ignore_errors=True)
    started = perf_counter()
    nbytes = make(size, folder, arguments["device"])
    note({"checkpoint_bytes": nbytes, "seconds": perf_counter() - started})


def room_for(size: str) -> int:
    """Bytes on disk for the model and the quantized checkpoints that are made of it."""
    return 3 * CHECKPOINT_BYTES[size] if size != "8b" else int(1.2 * CHECKPOINT_BYTES[size])


def make(size: str, folder: Path, device: str) -> int:
    """Write the checkpoint; returns its bytes. Seeded: the same on the same kind of device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES[size], max_position_embeddings=4096, dtype="bfloat16", bos_token_id=1, eos_token_id=2,
                         pad_token_id=0)  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.named_parameters()}  # tied ones once
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    common.tiny_tokenizer(folder.parent / "tiny-models").save_pretrained(folder)
    where: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards(shapes, device), start=1):
        name = f"model-{number:05}.safetensors"
        save(shard, folder / name)
        where |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / WRITTEN).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return total


def shards(shapes: dict[str, tuple[int, ...]], device: str) -> Iterator[dict[str, Any]]:
    """Groups of tensors of about SHARD_BYTES, bfloat16, on the CPU."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    shard: dict[str, Any] = {}
    for name, shape in shapes.items():
        tensor = torch.ones(shape, dtype=torch.bfloat16, device=device)
        if len(shape) > 1:
            spread = LOGITS_SPREAD if name.startswith(("lm_head", "model.embed")) else 1.0
            tensor.normal_(std=spread / shape[-1] ** 0.5, generator=generator)
        shard[name] = tensor.cpu()
        if sum(each.nbytes for each in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def save(tensors: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, {"format": "pt"})


if __name__ == "__main__":
    common.step(measure)
