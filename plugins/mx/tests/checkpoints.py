"""Small checkpoints of others' formats: gpt-oss in MXFP4 as transformers has it."""

import json
import shutil
from pathlib import Path

import torch
from polyquant.testing.models import tiny_model
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

EXPERTS = "model.layers.{}.mlp.experts"
MATRICES = ("gate_up_proj", "down_proj")
DENSE = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
TOKENS = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


def gpt_oss(folder: Path, hidden: int = 64, intermediate: int = 96, experts: int = 4) -> Path:
    """A dense gpt-oss of random weights, float32, in `folder`/gpt-oss."""
    out = folder / "gpt-oss"
    if out.exists():
        return out
    config = GptOssConfig(
        vocab_size=384, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=experts, num_experts_per_tok=2,
        max_position_embeddings=256, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name:
                parameter.normal_(std=0.4)
    model.save_pretrained(out)
    for file in tiny_model("llama", folder).glob("token*"):
        shutil.copy(file, out)
    return out


def packed_gpt_oss(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """(`folder`/gpt-oss-mxfp4: `gpt_oss` with experts of random codes and scales, as gpt-oss' own files have them; the
    random tensors)."""
    dense, out = gpt_oss(folder), folder / "gpt-oss-mxfp4"
    shutil.copytree(dense, out, dirs_exist_ok=True)
    tensors, generator = load_file(dense / "model.safetensors"), torch.Generator().manual_seed(1)
    made: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for name in MATRICES:
            whole = f"{EXPERTS.format(layer)}.{name}"
            count, columns, rows = tensors.pop(whole).shape
            shape = (count, rows, columns // 32)
            made[f"{whole}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            made[f"{whole}_scales"] = torch.randint(119, 127, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors | made, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": DENSE}
    (out / "config.json").write_text(json.dumps(config))
    return out, made
