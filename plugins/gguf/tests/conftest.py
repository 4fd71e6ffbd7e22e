"""Small models of each architecture, written as GGUF files the way llama.cpp's converter lays them out."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, quants
from polyquant_gguf import _metadata
from polyquant.plugin.gguf import TYPES
from polyquant_gguf.names import gguf_names

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
CLASSES = {
    "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3", "starcoder2": "Starcoder2",
    "stablelm": "StableLm", "gemma2": "Gemma2", "gemma3": "Gemma3", "nemotron": "Nemotron",
    "olmo2": "Olmo2", "granite": "Granite", "command-r": "Cohere", "gemma": "Gemma", "smollm3": "SmolLM3",
    "ernie4_5": "Ernie4_5", "seed_oss": "SeedOss", "arcee": "Arcee", "olmoe": "Olmoe", "mixtral": "Mixtral", "qwen2moe": "Qwen2Moe", "qwen3moe": "Qwen3Moe", "gpt-oss": "GptOss",
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}
MIXTURES = {
    "mixtral": {"num_local_experts": 4}, "gpt-oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2moe": {"num_experts": 4, "shared_expert_intermediate_size": 160, **EXPERTS},
    "qwen3moe": {"num_experts": 4, "norm_topk_prob": True, **EXPERTS},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},  # as llama.cpp has it
}  # fmt: skip
"""Sizes of mixtures, with two experts for a token. GGUF calls Mixtral llama."""


def tiny(architecture: str, **more: object) -> torch.nn.Module:
    """A dense float32 model with random weights, norms that are not ones and biases that are not zero."""
    name = CLASSES[architecture]
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config_name = "Gemma3TextConfig" if architecture == "gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**{**SIZES, **MIXTURES.get(architecture, {}), **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(torch.randn_like(tensor) * (0.3 if tensor.dim() == 1 else 0.1))
    return model


def as_llama_cpp(name: str, tensor: torch.Tensor, architecture: str, config: object) -> list[torch.Tensor]:
    """What convert_hf_to_gguf.py does to a tensor: LlamaModel.permute, Gemma's and Nemotron's norms plus one, gates of
    experts apart from ups (GptOssModel has them in turn, Qwen2MoeModel's shared gate is a vector)."""
    if architecture in ("llama", "mixtral", "granite", "smollm3", "arcee") and (
        ".q_proj." in name or ".k_proj." in name
    ):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        shape = tensor.shape
        return [tensor.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)]
    if architecture in ("gemma", "gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return [tensor + 1]
    if architecture == "gpt-oss" and ".experts." in name and not name.endswith("bias"):
        tensor = tensor.transpose(-1, -2)
    if ".experts.gate_up_proj" in name:
        return [tensor[:, ::2], tensor[:, 1::2]] if architecture == "gpt-oss" else list(tensor.chunk(2, dim=1))
    return [tensor.squeeze(0) if name.endswith("shared_expert_gate.weight") else tensor]


def write_gguf(
    path: Path, model: torch.nn.Module, architecture: str, kind: str = "F32", more: dict = {}, **extra: object
) -> Path:
    """kind: type of the matrices whose rows are whole blocks; vectors are F32. more: keys; extra: tensors to add."""
    made, architecture = architecture, "llama" if architecture == "mixtral" else architecture
    writer = GGUFWriter(path, architecture)
    keys = _metadata.model_keys(model.config, architecture) | _metadata.token_ids(model.config)
    if "vocab_size" not in _metadata.model_keys(model.config, architecture):
        keys[f"{architecture}.vocab_size"] = model.config.vocab_size
    tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["! !"]}
    alphabet = [chr(code) for code in range(33, 127)] + ["!!", "Ġ"]
    keys |= tokens | {"tokenizer.ggml.tokens": alphabet[: model.config.vocab_size]}
    for key, value in (keys | more).items():
        if value is not None:
            _metadata.add(writer, key, value)
    tied = set(model.all_tied_weights_keys)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters() if name not in tied}
    names = gguf_names(architecture, model.config.num_hidden_layers, tensors)
    stored = {
        short: part
        for name, tensor in tensors.items()
        for short, part in zip(names[name], as_llama_cpp(name, tensor, made, model.config), strict=True)
    }
    stored |= {name.replace("__", "."): tensor for name, tensor in extra.items()}
    for name, tensor in stored.items():
        is_plain = tensor.dim() == 1 or "ffn_gate_inp" in name or name.endswith(".bias")
        chosen = "F32" if is_plain or tensor.shape[-1] % TYPES[kind].elements else kind
        numbers = tensor.contiguous().numpy()
        writer.add_tensor(
            name, quants.quantize(numbers, GGMLQuantizationType[chosen]), raw_dtype=GGMLQuantizationType[chosen]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def llama(tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    """A dense llama and its Q8_0 file."""
    model = tiny("llama", tie_word_embeddings=False)
    return model, write_gguf(tmp_path / "llama.gguf", model, "llama", "Q8_0")


@pytest.fixture
def patched(llama: tuple[torch.nn.Module, Path]) -> Callable[[bytes, bytes], Path]:
    """The llama file with bytes replaced once."""
    _, path = llama

    def patch(old: bytes, new: bytes) -> Path:
        content = path.read_bytes()
        assert content.count(old) >= 1
        path.write_bytes(content.replace(old, new, 1))
        return path

    return patch


def row(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A row of the tensor table; shape as torch has it."""
    sizes = struct.pack(f"<{len(shape)}Q", *shape[::-1])
    return (
        struct.pack("<Q", len(name))
        + name.encode()
        + struct.pack("<I", len(shape))
        + sizes
        + struct.pack("<IQ", kind, offset)
    )
