"""Makes checkpoints with auto-round: plain rounding, or rounding tuned with calibration text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from polyquant import hf, packed
from polyquant.calibration import token_windows
from polyquant.errors import ConfigError, SaveError
from polyquant.memory.weights import list_weights
from polyquant.models.checks import check_folder
from polyquant.options import resolved_dtype
from polyquant.request import LoadRequest
from polyquant.types import WeightInfo

from polyquant_auto_round._library import AutoRound, QuantizationScheme, RTNConfig, SignRoundConfig, running
from polyquant_auto_round.options import AutoRoundOptions
from polyquant_auto_round.planning import plan_layers

DENSE = {"bits": 16, "act_bits": 16, "data_type": "float"}
BATCH = 8


def algorithm(config: AutoRoundOptions) -> Any:
    """Rounding to nearest, without the search for scales that needs activations; or tuned rounding."""
    with running(shown=False):
        return SignRoundConfig(iters=config.iters) if config.iters else RTNConfig(disable_opt_rtn=True)


def quantize(request: LoadRequest, config: AutoRoundOptions, calibration: Sequence[str], out: Path) -> Path:
    if calibration and not config.iters:
        raise ConfigError(
            "with iters=0 weights are rounded without calibration text; leave it out, or tune with it: iters=200"
        )
    source, trusted = request.source, request.trust_remote_code
    weights = list_weights(hf.skeleton(source, resolved_dtype(config), trust_remote_code=trusted))
    quantized, skipped, head = _settled(weights, config)
    tokenizer = hf.load_tokenizer(source, trust_remote_code=trusted)
    windows = _windows(tokenizer, calibration, config) if config.iters else []
    model = hf.load_causal_lm(request, "float32")
    try:
        with running(shown=request.progress):
            rounding = AutoRound(
                model, tokenizer, alg_configs=algorithm(config), dataset=windows or None,
                scheme=QuantizationScheme(bits=config.bits, group_size=config.group_size, sym=config.sym),
                layer_config={name: dict(DENSE) for name in skipped}, quant_lm_head=head,
                nsamples=len(windows) or 1, seqlen=windows[0]["input_ids"].shape[1] if windows else 32,
                batch_size=min(BATCH, len(windows) or 1), device_map=request.device, enable_torch_compile=False,
                low_cpu_mem_usage=False, trust_remote_code=trusted,
                amp=False,  # in bfloat16 it would round the weights before quantizing them
            )  # fmt: skip
            _, folder = rounding.quantize_and_save(str(out / "export"), format=config.format)
    except SystemExit as error:
        raise SaveError("auto-round gave up on this model; with progress on, it says why") from error
    _complete(out, Path(folder), config)
    written = packed.tensor_names(check_folder(out, str(out)))
    if left := [name for name in quantized if f"{name}.qweight" not in written]:
        raise SaveError(f"auto-round left {len(left)} of {len(quantized)} layers dense: {', '.join(left[:3])}")
    return out


def _settled(weights: Sequence[WeightInfo], config: AutoRoundOptions) -> tuple[list[str], list[str], bool]:
    """Names of the layers to quantize, those of a block that stay dense, and whether the head is quantized."""
    plans = plan_layers(weights, config)
    names = [
        (weight.name.rpartition(".")[0], weight.role, plan.quantized)
        for weight, plan in zip(weights, plans, strict=True)
    ]
    quantized = [name for name, _, taken in names if taken]
    skipped = [name for name, role, taken in names if role == "linear" and not taken]
    return quantized, skipped, any(role == "head" and taken for _, role, taken in names)


def _windows(tokenizer: Any, calibration: Sequence[str], config: AutoRoundOptions) -> list[dict[str, torch.Tensor]]:
    """Windows of one length, each a batch of one: auto-round drops what is shorter. A short text is one window."""
    windows = token_windows(tokenizer, calibration, length=config.sample_tokens, count=config.samples)
    tensors = [torch.tensor([window]) for window in windows if len(window) == len(windows[0])]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tensors]


def _complete(out: Path, folder: Path, config: AutoRoundOptions) -> None:
    """Move the export to `out`, and add to its config what auto-round does not store: defaults and dense modules."""
    for path in folder.iterdir():
        path.rename(out / path.name)
    shutil.rmtree(out / "export")
    content = json.loads((out / "config.json").read_text())
    content["quantization_config"] |= config.stored()
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n")
