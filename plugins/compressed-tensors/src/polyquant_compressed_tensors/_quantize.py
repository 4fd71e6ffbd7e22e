"""Makes checkpoints with llm-compressor, and notes in them what compressed-tensors has no field for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from polyquant.errors import ConfigError
from polyquant.plugin import Dtype, LoadRequest, checkpoints, dense_linears, require_library, resolved_dtype
from polyquant.plugin.calibration import token_windows
from torch.utils.data import DataLoader

from polyquant_compressed_tensors._library import LLM_COMPRESSOR, quantization_scheme, quiet_llm_compressor
from polyquant_compressed_tensors.formats import OWN
from polyquant_compressed_tensors.options import READ_ONLY, CompressedTensorsOptions
from polyquant_compressed_tensors.planning import plan_layers


def quantize(request: LoadRequest, config: CompressedTensorsOptions, calibration: Sequence[str], out: Path) -> Path:
    """Raises ConfigError for what makes no checkpoint, EnvironmentProblem where llm-compressor is not there."""
    if config.weights == "sparse":
        raise ConfigError(READ_ONLY)
    if config.method == "unknown":
        raise ConfigError("method 'unknown' is for checkpoints that do not say theirs; quantize with 'rtn' or 'gptq'")
    if calibration and not config.uses_text:
        raise ConfigError(
            "method 'rtn' rounds to nearest and uses no calibration text; leave calibration (--calibration) out, "
            "or choose method='gptq'"
        )
    checkpoints.require_linears(request.weights, config)
    plan_layers(request.weights, config)  # both refuse what does not fit before a weight is read
    tokenizer = checkpoints.load_tokenizer(request.source, trust_remote_code=request.trust_remote_code)
    batches = _batches(tokenizer, config, calibration) if config.uses_text else None
    with quiet_llm_compressor(progress=request.progress):
        require_library(LLM_COMPRESSOR, "llm-compressor, which makes these checkpoints, cannot run")
        _run(request, config, tokenizer, batches, out)
    _note_own_fields(out / "config.json", config)
    return out


def _run(
    request: LoadRequest, config: CompressedTensorsOptions, tokenizer: Any, batches: DataLoader[Any] | None, out: Path
) -> None:
    from llmcompressor import oneshot
    from llmcompressor.core import create_session
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    modifier = GPTQModifier if config.method == "gptq" else QuantizationModifier
    schemes = [quantization_scheme(config)]
    for name, options in config.formats().items():
        schemes.append(quantization_scheme(options, [module for module, chosen in config.layers if chosen == name]))
    groups = {f"group_{number}": scheme for number, scheme in enumerate(schemes)}
    recipe = modifier(config_groups=groups, ignore=dense_linears(request.weights, config))
    model = checkpoints.load_causal_lm(request, _dtype(request, config))
    with create_session():
        oneshot(
            model=model, tokenizer=tokenizer, recipe=recipe, dataset=batches, output_dir=str(out),
            shuffle_calibration_samples=False,
        )  # fmt: skip


def _dtype(request: LoadRequest, config: CompressedTensorsOptions) -> Dtype:
    """What the dense model is read in. GPTQ runs it over all the text, and few CPUs are fast in bfloat16."""
    return "float32" if config.method == "gptq" and request.device == "cpu" else resolved_dtype(config)


def _batches(tokenizer: Any, config: CompressedTensorsOptions, calibration: Sequence[str]) -> DataLoader[Any]:
    """Windows of tokens, one a batch: input_ids and attention_mask of shape (1, tokens)."""
    windows = token_windows(tokenizer, calibration, length=config.length, count=config.samples)
    batches = [
        {"input_ids": torch.tensor([window]), "attention_mask": torch.ones(1, len(window), dtype=torch.int64)}
        for window in windows
    ]
    return DataLoader(batches, batch_size=None)


def _note_own_fields(path: Path, config: CompressedTensorsOptions) -> None:
    """Which method, with how much text. The compute dtype is left to each load."""
    content = json.loads(path.read_text())
    own = config.own_fields()
    content["quantization_config"][OWN] = {name: value for name, value in own.items() if name != "compute_dtype"}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
