"""Makes what cells load, once: random models, and checkpoints of backends that do not quantize as they load.

Everything lies in the folder `bench` of polyquant's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import polyquant
from polyquant.models.resolve import resolve_dense
from polyquant.support.cache import cache_folder
from polyquant.support.files import once

from bench_packed.cells import REAL, Figures, Sizes, Source, run

LLAMA_CPP = "llama-cpp"
BETWEEN = "Q8_0"  # the GGUF that llama.cpp quantizes: 8 bits in blocks of 32, embedding in float32
VOCABULARY = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # of SmolLM2's tokenizer
BILLION = {
    "hidden_size": 2048, "num_key_value_heads": 8, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
BASE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
RANDOM: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama-1b": ("llama", {  # Llama-3.2-1B's shape but for the vocabulary, which has 128256 tokens there
        **BILLION, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192,
    }),
    "qwen3-1b": ("qwen3", {  # Qwen3-1.7B's layers, 20 of the 28
        **BILLION, "num_hidden_layers": 20, "num_attention_heads": 16, "intermediate_size": 6144, "head_dim": 128,
    }),
    "gpt2": ("gpt2", BASE),  # 124 million weights, and so about the others
    "gpt-neox": ("gpt_neox", {**BASE, "intermediate_size": 3072}),
    "opt": ("opt", {**BASE, "ffn_dim": 3072, "word_embed_proj_dim": 768}),
    "phi": ("phi", {**BASE, "intermediate_size": 3072}),
    "stablelm": ("stablelm", {**BASE, "intermediate_size": 3072, "num_key_value_heads": 12}),
}  # fmt: skip
"""Name -> model type and sizes of a model with random weights, in bfloat16, with SmolLM2's tokenizer."""
TINY = {
    **dict.fromkeys(("hidden_size", "word_embed_proj_dim"), 256), "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, **dict.fromkeys(("intermediate_size", "ffn_dim"), 512),
}  # fmt: skip
"""What becomes of the sizes of a small one."""


def is_there(source: Source) -> bool:
    """Whether there is nothing to make."""
    return (not source.backend and source.model not in RANDOM) or (_folder() / source.name).exists()


def made(source: Source) -> str:
    """What to load for `source`, made where it is not there. Raises PolyquantError."""
    model = source.model if source.model not in RANDOM else str(_random(source))
    if not source.backend:
        return model
    out = _folder() / source.name
    if not out.exists():
        info = polyquant.backend(source.backend).info
        if source.backend == LLAMA_CPP:
            model = made(msgspec.structs.replace(source, backend="gguf", preset=BETWEEN))
        polyquant.quantize(model, source.backend, out, **info.presets[source.preset])
    return str(out)


def _folder() -> Path:
    return cache_folder() / "bench"


def _random(source: Source) -> Path:
    plain = msgspec.structs.replace(source, backend="", preset="")
    return once(_folder() / plain.name, lambda out: _build(plain, out))


def _build(source: Source, out: Path) -> None:
    import torch
    from polyquant.models import hf, versions
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = RANDOM[source.model]
    if source.small:
        sizes = {name: TINY.get(name, value) for name, value in sizes.items()}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **VOCABULARY, **sizes)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **versions.dtype_argument(torch.bfloat16))
    with versions.progress_bars(enabled=False):
        model.save_pretrained(out)
    hf.load_tokenizer(resolve_dense(REAL)).save_pretrained(out)


def measure(source: Source, sizes: Sizes, **job: Any) -> Figures:
    """For a process of its own, before any cell is measured: what is made here takes no part in that."""
    made(source)
    return {}


if __name__ == "__main__":
    run(measure)
