"""The step `BACKEND:PRESET@SIZE direct`: the library without polyquant, in the same dtype, timed the same way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import steps

Load = Callable[[Path, str, Any], Any]
"""(model, device, dtype) -> a transformers model."""


def measure(arguments: common.Facts, note: common.Note) -> None:
    import torch
    from transformers import AutoTokenizer

    name, device = arguments["candidate"], arguments["device"]
    dtype = getattr(torch, common.compute_dtype(name.partition(":")[0], device))
    source = Path(arguments["checkpoint"] if name in steps.FROM_CHECKPOINT else arguments["model"])
    started = perf_counter()
    model, peak = common.peak_of(lambda: DIRECT[name](source, device, dtype))
    note({"load_seconds": perf_counter() - started, "load_peak_bytes": peak, "compute_dtype": str(dtype)[6:]})
    vocabulary = len(AutoTokenizer.from_pretrained(arguments["model"], trust_remote_code=False))
    note(common.speed_of(common.plain_session(model.eval()), vocabulary, small=arguments["small"]))


def through_transformers(model: Path, device: str, dtype: Any, config: Any = None) -> Any:
    from transformers import AutoModelForCausalLM

    settings = {"quantization_config": config} if config is not None else {}
    return AutoModelForCausalLM.from_pretrained(
        model, device_map=common.all_on(device), dtype=dtype, trust_remote_code=False, **settings
    )


def bitsandbytes(**settings: Any) -> Load:
    def load(model: Path, device: str, dtype: Any) -> Any:
        from transformers import BitsAndBytesConfig

        own = {"bnb_4bit_compute_dtype": dtype} if settings.get("load_in_4bit") else {}
        return through_transformers(model, device, dtype, BitsAndBytesConfig(**settings, **own))

    return load


def torchao_int8(model: Path, device: str, dtype: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return through_transformers(model, device, dtype, TorchAoConfig(Int8WeightOnlyConfig()))


def quanto_int8(model: Path, device: str, dtype: Any) -> Any:
    from transformers import QuantoConfig

    return through_transformers(model, device, dtype, QuantoConfig(weights="int8"))


def hqq_int4(model: Path, device: str, dtype: Any) -> Any:
    """hqq's own loop over a dense model: transformers' way of calling it is broken."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    dense = through_transformers(model, "cpu", dtype)
    config = BaseQuantizeConfig(nbits=4, group_size=64)
    AutoHQQHFModel.quantize_model(dense, quant_config=config, compute_dtype=dtype, device=device)
    return dense


def gptqmodel(model: Path, device: str, dtype: Any) -> Any:
    from gptqmodel import GPTQModel

    return GPTQModel.load(str(model), device=device, dtype=dtype).model


DIRECT: dict[str, Load] = {
    "bitsandbytes:nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes:nf4-dq": bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes:int8": bitsandbytes(load_in_8bit=True),
    "torchao:int8": torchao_int8,
    "quanto:int8": quanto_int8,
    "hqq:int4": hqq_int4,
    "compressed-tensors:int4": through_transformers,
    "gptq:int4": gptqmodel,
    "awq:int4": gptqmodel,
}  # fmt: skip


if __name__ == "__main__":
    common.step(measure)
