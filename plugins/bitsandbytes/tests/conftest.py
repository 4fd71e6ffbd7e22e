"""Tiny models, built once for the session, and how they are loaded."""

from __future__ import annotations

from pathlib import Path

import polyquant
import pytest
import torch
import transformers

TOKENS = list(range(3, 35))
NF4 = {"bits": 4, "quant_type": "nf4"}
CONFIGURATIONS = {
    "nf4": (NF4, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}),
    "nf4-dq": (
        {**NF4, "double_quant": True},
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "float32",
        },
    ),
    "fp4": (
        {"quant_type": "fp4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32"},
    ),
    "int8": ({"bits": 8}, {"load_in_8bit": True}),
}


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "The", "capital", "of", "France", "is"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def _build(folder: Path, architecture: str, **sizes: object) -> Path:
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=64, hidden_size=64, intermediate_size=sizes.pop("intermediate_size", 128), num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    _tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Llama with an untied head."""
    return _build(tmp_path_factory.mktemp("tiny") / "llama", "Llama", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def odd(tmp_path_factory):
    """Llama, tied, with sizes that are no multiples of a block or of a kernel's tile."""
    return _build(
        tmp_path_factory.mktemp("tiny") / "odd", "Llama", tie_word_embeddings=True, head_dim=10, intermediate_size=92
    )


@pytest.fixture(scope="session")
def experts(tmp_path_factory):
    """Mixtral, whose experts are fused tensors."""
    return _build(tmp_path_factory.mktemp("tiny") / "mixtral", "Mixtral", num_local_experts=4)


def load(model, **options):
    return polyquant.load(model, "bitsandbytes", device="cpu", compute_dtype="float32", **options)
