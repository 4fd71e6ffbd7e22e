"""Makes GPTQ checkpoints with auto-gptq, whose own code has a CUDA device written into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from polyquant.errors import ConfigError
from polyquant.plugin import LoadRequest, checkpoints, contained, quantized_modules, resolved_dtype
from polyquant.plugin.calibration import token_windows

from polyquant_autogptq._library import GPTQ_CAUSAL_LM_MODEL_MAP, base, quantize_config
from polyquant_autogptq.options import AutogptqOptions
from polyquant_autogptq.planning import plan_layers

WINDOW_TOKENS, WINDOWS = 512, 32  # of calibration text, at most


def quantize(request: LoadRequest, config: AutogptqOptions, calibration: Sequence[str], out: Path) -> Path:
    source, trusted = request.source, request.trust_remote_code
    checkpoints.require_linears(request.weights, config)
    plans = plan_layers(request.weights, config)
    if asked := [plan.name for plan in plans if plan.role == "linear" and not plan.quantized]:
        raise ConfigError(f"auto-gptq quantizes all layers of a block, and {asked[0]} is to stay dense; leave skip out")
    if any(plan.role == "head" and plan.quantized for plan in plans):
        raise ConfigError("auto-gptq leaves the output head dense; leave skip_defaults as it is")
    model_type = source.config.get("model_type")
    kind = GPTQ_CAUSAL_LM_MODEL_MAP.get(model_type)
    if kind is None:
        known = ", ".join(GPTQ_CAUSAL_LM_MODEL_MAP)
        raise ConfigError(f"auto-gptq does not quantize models of the type {model_type}, only {known}")
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=trusted)
    windows = token_windows(tokenizer, calibration, length=WINDOW_TOKENS, count=WINDOWS)
    examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows]
    with nullcontext() if request.progress else contained():
        wrapped = kind(checkpoints.load_causal_lm(request, resolved_dtype(config)), False, quantize_config(config))
        with _on_cpu() if request.device == "cpu" else nullcontext():
            wrapped.quantize(examples, cache_examples_on_gpu=False)
        wrapped.save_quantized(str(out))
    (written,) = out.glob("*.safetensors")
    written.rename(out / "model.safetensors")  # what other readers look for
    checkpoints.complete(out, source, config.skip, tokenizer)
    checkpoints.require_packed(out, quantized_modules(plans), "auto-gptq")
    return out


@contextmanager
def _on_cpu() -> Iterator[None]:
    """Within the block, the library's CUDA device is the CPU, and it waits for no GPU."""
    device, wait = base.CUDA_0, torch.cuda.synchronize
    base.CUDA_0, torch.cuda.synchronize = base.CPU, lambda *device: None
    try:
        yield
    finally:
        base.CUDA_0, torch.cuda.synchronize = device, wait
