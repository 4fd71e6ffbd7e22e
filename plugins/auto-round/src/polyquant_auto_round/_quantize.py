"""Makes checkpoints with auto-round: plain rounding, or rounding tuned with calibration text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyquant.errors import ConfigError
from polyquant.plugin import LoadRequest, checkpoints, module_of, quantized_modules
from polyquant.plugin.calibration import token_windows
from polyquant.plugin.process import run_in_process

from polyquant_auto_round.options import AutoRoundOptions
from polyquant_auto_round.planning import plan_layers


def quantize(request: LoadRequest, config: AutoRoundOptions, calibration: Sequence[str], out: Path) -> Path:
    if calibration and not config.iters:
        raise ConfigError(
            "with iters=0 weights are rounded without calibration text; leave it out, or tune with it: iters=200"
        )
    source, trusted = request.source, request.trust_remote_code
    plans = plan_layers(request.weights, config)
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=trusted)
    job = {
        "model": str(source.path.absolute()), "device": request.device, "trusted": trusted, "options": config,
        "windows": _windows(tokenizer, calibration, config) if config.iters else [],
        "dense": [module_of(plan) for plan in plans if plan.role == "linear" and not plan.quantized],
        "head": any(plan.role == "head" and plan.quantized for plan in plans),
        "out": str((out / "export").absolute()),
    }  # fmt: skip
    run_in_process("polyquant_auto_round._worker", job, shown=request.progress)
    _complete(out, config)
    checkpoints.require_packed(out, quantized_modules(plans), "auto-round")
    return out


def _windows(tokenizer: Any, calibration: Sequence[str], config: AutoRoundOptions) -> list[list[int]]:
    """Windows of one length: auto-round drops what is shorter. A text that is shorter than a window is one."""
    assert config.sample_tokens is not None  # set where iters is above 0
    assert config.samples is not None
    windows = token_windows(tokenizer, calibration, length=config.sample_tokens, count=config.samples)
    return [window for window in windows if len(window) == len(windows[0])]


def _complete(out: Path, config: AutoRoundOptions) -> None:
    """Move the export up to `out`, and add to its config what auto-round does not store: defaults and dense modules."""
    (folder,) = (out / "export").iterdir()  # named after the model and the scheme
    for path in folder.iterdir():
        path.rename(out / path.name)
    folder.rmdir()
    (out / "export").rmdir()
    content = json.loads((out / "config.json").read_text())
    content["quantization_config"] |= config.to_stored()
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n")
