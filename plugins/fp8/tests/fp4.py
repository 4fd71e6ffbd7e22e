"""A mixture with experts in FP4, as DeepSeek-V4's checkpoints have them; its other layers are FP8."""

import json
import re

import torch
from polyquant.plugin.floats import e2m1_codes, e8m0_bytes, pairs_of_codes
from polyquant.testing.models import ONE_BY_ONE, SIZES, write_random
from polyquant_fp8._decode import quantize
from safetensors.torch import load_file, save_file

BLOCK = (64, 64)
STORED = {
    "quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic", "scale_fmt": "ue8m0",
    "modules_to_not_convert": ["lm_head"], "expert_dtype": "fp4",
}  # fmt: skip
E8M0 = torch.float8_e8m0fnu


def to_fp4(weight):
    """(bytes of two codes, scales of 32 columns) of a matrix: the largest of a group within E2M1's range."""
    groups = weight.float().unflatten(1, (-1, 32))
    exponents = torch.floor(torch.log2(groups.abs().amax(-1).clamp_min(1e-30))) - 2
    codes = e2m1_codes(groups / torch.exp2(exponents).unsqueeze(-1)).flatten(1)
    return pairs_of_codes(codes).view(torch.int8), e8m0_bytes(exponents).view(E8M0)


QWEN3_MOE = ("Qwen3Moe", {**SIZES, **ONE_BY_ONE["qwen3-moe"][1]})
DEEPSEEK_V4 = (
    "DeepseekV4",
    {
        "vocab_size": SIZES["vocab_size"], "hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "head_dim": 64, "q_lora_rank": 64, "num_experts_per_tok": 2, "n_routed_experts": 4,
        "o_groups": 2, "o_lora_rank": 64, "index_n_heads": 2, "index_head_dim": 64, "index_topk": 16, "hc_mult": 2,
        "max_position_embeddings": 512,
    },
)  # fmt: skip
FP8 = re.compile(r"(proj|\.wq_a|\.wq_b|attn\.wkv|\.wo_b|shared_experts\.w\d)\.weight$")
"""Names of weights that are FP8: DeepSeek-V4's files have its own, and some layers that are dense."""


def write_fp4(tokenizer, out, *, model=QWEN3_MOE, named="weight_scale_inv", says=True):
    """A tiny mixture. tokenizer: a folder that has one. named: what scales are called; says: whether its config does."""
    write_random(*model, out, tokenizer)
    tensors = load_file(out / "model.safetensors")
    for name in [each for each in tensors if each.endswith(".weight")]:
        module = name.removesuffix(".weight")
        if ".experts." in name:
            tensors[name], tensors[f"{module}.{named}"] = to_fp4(tensors[name])
        elif FP8.search(name):
            tensors[name], tensors[f"{module}.{named}"] = quantize(tensors[name], BLOCK, powers_of_two=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    stored = STORED if says else {name: value for name, value in STORED.items() if name != "expert_dtype"}
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(content | {"quantization_config": stored}))
    return out
