"""Tiny models of the families that mlx-lm has too, and mlx on the CPU."""

import polyquant
import pytest
import torch
import transformers
from polyquant.testing.models import SIZES, tiny_model

LAYER = "model.layers.0.mlp.up_proj"
TOKENS = list(range(5, 29))
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 256}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 15e4, "factor": 4.0, "original_max_position_embeddings": 128}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
FAMILIES = {
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3", {"tie_word_embeddings": True, "num_hidden_layers": 6}),  # every sixth layer is another
    "phi": ("Phi", {"head_dim": None}),
    "phi3": ("Phi3", {"original_max_position_embeddings": 512}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen3-moe": ("Qwen3Moe", MOE),
    "gpt-oss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "rope_parameters": YARN},
    ),
}
MIXTURES = ("mixtral", "qwen3-moe", "gpt-oss")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mlx")


@pytest.fixture(scope="session")
def family(folder):
    """The dense checkpoint of a tiny model of a family; made once."""

    def make(name):
        path = folder / name
        if not path.exists():
            architecture, more = FAMILIES[name]
            sizes = {key: value for key, value in {**SIZES, **more}.items() if value is not None or "window" in key}
            kind = f"{architecture}TextConfig" if name == "gemma3" else f"{architecture}Config"
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = getattr(transformers, f"{architecture}ForCausalLM")(
                    getattr(transformers, kind)(**sizes)
                ).float()
                for own, parameter in model.named_parameters():
                    if parameter.dim() > 1:
                        spread = 2.0 if "embed" in own or "lm_head" in own else 1.0
                        parameter.data.normal_(std=spread / parameter.shape[-1] ** 0.5)
            model.save_pretrained(path)
            transformers.AutoTokenizer.from_pretrained(tiny_model("llama", folder)).save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def checkpoint(folder):
    """A folder that polyquant wrote of the tiny llama with options; made once."""

    def make(model="llama", **options):
        out = folder / "-".join(["saved", model, *(f"{name}={value}" for name, value in options.items())])
        if not out.exists():
            load(tiny_model(model, folder), **options).save(out)
        return out

    return make


def load(path, **options):
    return polyquant.load(path, "mlx", device="cpu", **{"kernel": "library", **options})
