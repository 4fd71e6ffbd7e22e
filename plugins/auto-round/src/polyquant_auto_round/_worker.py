"""auto-round at work, in a process of its own: it seeds, patches and ends the process that it runs in."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from auto_round import AutoRound, QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer

from polyquant_auto_round._library import algorithm
from polyquant_auto_round.options import AutoRoundOptions

BATCH = 8
DENSE = {"bits": 16, "act_bits": 16, "data_type": "float"}
SHORTEST = 32  # a length, where no text is used


def main(job: dict[str, Any]) -> None:
    config = msgspec.convert(job["options"], AutoRoundOptions)
    model, trusted = job["model"], job["trusted"]
    ids = [torch.tensor([window]) for window in job["windows"]]
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=trusted, local_files_only=True
        ),
        AutoTokenizer.from_pretrained(model, trust_remote_code=trusted, local_files_only=True),
        scheme=QuantizationScheme(bits=config.bits, group_size=config.group_size, sym=config.sym),
        alg_configs=algorithm(config),
        layer_config={name: dict(DENSE) for name in job["dense"]},
        quant_lm_head=job["head"],
        dataset=[{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in ids] or None,
        nsamples=len(ids) or 1,
        seqlen=ids[0].shape[1] if ids else SHORTEST,
        batch_size=min(BATCH, len(ids) or 1),
        device_map=job["device"],
        trust_remote_code=trusted,
        enable_torch_compile=False,  # it starts a C++ compiler
        low_cpu_mem_usage=False,  # it would keep blocks in files in the working directory
        amp=False,  # bfloat16 would round the weights before they are quantized
    )
    rounding.quantize_and_save(job["out"], format=config.format)
