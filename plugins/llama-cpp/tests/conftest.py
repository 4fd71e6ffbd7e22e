"""The suite's tiny models as GGUF files, laid out as llama.cpp's converter does, tokenizer included."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import polyquant
import pytest
from polyquant.testing.models import tiny_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

EXACT = {"kv_cache_type": "F32", "flash_attention": "off"}
TOKENS = list(range(5, 45))
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "mixtral": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
EXPERT = re.compile(r"(.*block_sparse_moe\.experts\.)(\d+)(\.w\d\.weight)")


def load(path, **options):
    return polyquant.load(path, "llama-cpp", **options)


def write_gguf(
    dense: Path, path: Path, kind: str = "F32", more: Callable[[gguf.GGUFWriter], None] | None = None
) -> Path:
    """The dense checkpoint folder as a GGUF. kind: type of its matrices, F32, F16 or one the gguf package quantizes."""
    config = json.loads((dense / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_keys(writer, config, kind)
    _add_tokenizer(writer, dense, config["vocab_size"])
    if more is not None:
        more(writer)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, tensor in _tensors(dense, config).items():
        chosen = gguf.GGMLQuantizationType[kind if tensor.ndim > 1 and "gate.weight" not in name else "F32"]
        stored = tensor if kind == "F32" else gguf.quants.quantize(tensor, chosen)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), stored, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(dense: Path, config: dict) -> dict[str, np.ndarray]:
    """By transformers' name, with the rows of q and k in llama.cpp's order and the experts of a layer in one tensor."""
    found: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if config["model_type"] != "qwen2" and re.search(r"\.[qk]_proj\.", name):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        if match := EXPERT.match(name):
            experts.setdefault(match[1] + match[3].lstrip("."), {})[int(match[2])] = tensor
        else:
            found[name] = np.ascontiguousarray(tensor)
    short = {"w1": "gate", "w2": "down", "w3": "up"}
    for name, each in experts.items():
        layer, kind = re.search(r"layers\.(\d+)", name)[1], short[name.split(".")[-2]]
        merged = {"gate": "w1", "down": "w2", "up": "w3"}[kind]
        found[f"layers.{layer}.feed_forward.experts.{merged}.weight"] = np.stack([each[i] for i in sorted(each)])
    return found


def _add_keys(writer: gguf.GGUFWriter, config: dict, kind: str) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    if experts := config.get("num_local_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])


def _add_tokenizer(writer: gguf.GGUFWriter, dense: Path, size: int) -> None:
    tokenizer = json.loads((dense / "tokenizer.json").read_text())
    tokens = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens |= special
    types = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(
        [types.CONTROL if n in special else types.NORMAL if n in tokens else types.UNUSED for n in range(size)]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    return write_gguf


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[..., Path]:
    """tiny(name, kind): the GGUF of a tiny model, with its dense folder beside it; made once."""
    folder = tmp_path_factory.mktemp("tiny")

    def make(name: str = "llama", kind: str = "F32") -> Path:
        path = folder / f"{name}-{kind}.gguf"
        return path if path.exists() else write_gguf(tiny_model(name, folder), path, kind)

    return make


@pytest.fixture(scope="module")
def exact(tiny):
    """exact(name): a tiny model in float32 throughout, in llama.cpp and in transformers."""

    def make(name="llama"):
        path = tiny(name, "F32")
        return load(path, allow_dequantize=True, **EXACT), AutoModelForCausalLM.from_pretrained(
            path.parent / name
        ).eval()

    return make


@pytest.fixture(scope="module")
def packed(tiny):
    return load(tiny("llama", "Q8_0"))
