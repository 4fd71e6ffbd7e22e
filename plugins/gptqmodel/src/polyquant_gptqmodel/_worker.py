"""gptqmodel at work, in a process of its own: an error in one of its threads ends the process that it runs in."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from polyquant_gptqmodel._library import GPTQModel, quantize_config
from polyquant_gptqmodel.options import AwqOptions, GptqOptions


def main(job: dict[str, Any]) -> None:
    config = msgspec.convert(job["options"], {"gptq": GptqOptions, "awq": AwqOptions}[job["method"]])
    dtype, trusted = getattr(torch, job["dtype"]), job["trusted"]
    how = {"device": job["device"], "dtype": dtype, "trust_remote_code": trusted}
    model = GPTQModel.load(job["model"], quantize_config(config), **how)
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["windows"]], batch_size=1)
    model.save(job["out"])
