"""gptqmodel at work, in a process of its own: an error in one of its threads ends the process that it runs in."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import torch

from polyquant_gptq._library import GPTQModel
from polyquant_gptq.options import GptqOptions


def main(job: dict[str, Any]) -> None:
    config = msgspec.convert(job["options"], GptqOptions)
    dtype, trusted = getattr(torch, job["dtype"]), job["trusted"]
    model = GPTQModel.load(job["model"], config.native(), device=job["device"], dtype=dtype, trust_remote_code=trusted)
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["windows"]], batch_size=1)
    model.save(job["out"])


if __name__ == "__main__":
    main(msgspec.json.decode(sys.stdin.buffer.read()))
