"""Tiny models of several architectures, made on the spot: nothing is downloaded. Seeded, so always the same.

Matrices are scaled so that the logits spread like those of a real model: noise of quantization shows in them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyquant.support.files import once
from polyquant.testing.texts import CALIBRATION

WORDS = 320  # of the tokenizer: 256 bytes, the special tokens and what it learns
LOGITS_SPREAD = 2.0  # standard deviation of the logits, roughly that of a language model
SPECIAL = ("<pad>", "<s>", "</s>")
SIZES: Mapping[str, Any] = {
    "vocab_size": 384, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),  # biases in its attention
    "mixtral": ("Mixtral", {"num_local_experts": 4}),  # fused experts
    "odd": ("Llama", {  # sizes that fit no group, block or kernel
        "vocab_size": 391, "hidden_size": 90, "intermediate_size": 203, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 30,
    }),
}  # fmt: skip

ONE_BY_ONE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}),
    "deepseek-v3": ("DeepseekV3", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64, "v_head_dim": 64, "num_key_value_heads": 4,
    }),
}  # fmt: skip
"""Mixtures whose checkpoints hold their experts one by one: the architecture, and what it has beside SIZES."""


def tiny_model(name: str, folder: Path) -> Path:
    """The checkpoint `folder`/`name`, float32 safetensors with a tokenizer; made once, by one process."""
    return once(folder / name, lambda out: _build(name, out))


def write_random(
    architecture: str, sizes: Mapping[str, Any], out: Path, tokenizer: Path, dtype: str = "float32"
) -> None:
    """Write a seeded model as transformers initializes it, rounded to `dtype`. tokenizer: a folder that has one."""
    import torch
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, f"{architecture}ForCausalLM")(config).to(getattr(torch, dtype)).save_pretrained(out)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, out)


def _build(name: str, out: Path) -> None:
    import torch
    import transformers

    from polyquant.models import versions

    architecture, sizes = ARCHITECTURES[name]
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config).float()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    spread = LOGITS_SPREAD if parameter_name.startswith(("lm_head", "model.embed")) else 1.0
                    parameter.normal_(std=spread / parameter.shape[-1] ** 0.5)
                elif parameter_name.endswith("bias"):
                    parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = None  # so that greedy decoding runs to the length that is asked for
    with versions.progress_bars(enabled=False):
        model.save_pretrained(out)
        _tokenizer().save_pretrained(out)


def _tokenizer() -> Any:
    """A byte-level BPE: any text encodes, and decodes to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CALIBRATION, trainer)
    pad, beginning, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=beginning, eos_token=end)
