"""Runs llm-compressor's oneshot and notes in the checkpoint what compressed-tensors has no field for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from llmcompressor import oneshot
from llmcompressor.core import create_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from polyquant.memory.weights import list_weights
from polyquant.models import hf
from polyquant.plugin import Dtype, LoadRequest, checkpoints, resolved_dtype
from polyquant.plugin.calibration import token_windows
from torch.utils.data import DataLoader

from polyquant_compressed_tensors.options import CompressedTensorsOptions
from polyquant_compressed_tensors.planning import ignored_modules, plan_layers
from polyquant_compressed_tensors.stored import OWN, own_fields


def quantize(request: LoadRequest, config: CompressedTensorsOptions, calibration: Sequence[str], out: Path) -> Path:
    source, trusted = request.source, request.trust_remote_code
    weights = list_weights(hf.skeleton(source, resolved_dtype(config), trust_remote_code=trusted))
    checkpoints.require_linears(weights, config)
    plan_layers(weights, config)  # both refuse what does not fit before a weight is read
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=trusted)
    batches = _batches(tokenizer, config, calibration) if config.method == "gptq" else None
    modifier = GPTQModifier if config.method == "gptq" else QuantizationModifier
    recipe = modifier(config_groups={"group_0": config.native()}, ignore=ignored_modules(weights, config))
    model = checkpoints.load_causal_lm(request, _dtype(request, config))
    with create_session(), checkpoints.progress_bars(request.progress):
        oneshot(
            model=model, tokenizer=tokenizer, recipe=recipe, dataset=batches, output_dir=str(out),
            shuffle_calibration_samples=False,
        )  # fmt: skip
    _note_own_fields(out / "config.json", config)
    return out


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
    own = own_fields(msgspec.structs.asdict(config))
    content["quantization_config"][OWN] = {name: value for name, value in own.items() if name != "compute_dtype"}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
