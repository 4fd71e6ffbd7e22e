"""Makes GPTQ and AWQ checkpoints with gptqmodel."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from polyquant.plugin import LoadRequest, ModelSource, checkpoints, quantized_modules, resolved_dtype
from polyquant.plugin.calibration import token_windows
from polyquant.plugin.process import run_in_process

from polyquant_gptqmodel.options import AwqOptions, Options
from polyquant_gptqmodel.planning import plan_layers

WINDOW_TOKENS, WINDOWS = 512, 128  # of calibration text, at most
WORKERS = str(max(2, min(12, (os.cpu_count() or 1) // 2)))  # its default is 1 on two cores, and then it fails


def quantize(request: LoadRequest, config: Options, calibration: Sequence[str], out: Path) -> Path:
    source, trusted = request.source, request.trust_remote_code
    checkpoints.require_linears(request.weights, config)
    planned = quantized_modules(plan_layers(request.weights, config))
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=trusted)
    windows = token_windows(tokenizer, calibration, length=WINDOW_TOKENS, count=WINDOWS)
    job = {
        "model": str(source.path.absolute()), "device": request.device, "dtype": _dtype(source, config),
        "trusted": trusted, "method": config.method, "options": config, "windows": windows,
        "out": str(out.absolute()),
    }  # fmt: skip
    run_in_process(
        "polyquant_gptqmodel._worker", job, shown=request.progress, environment={"GPTQMODEL_CPU_WORKERS": WORKERS}
    )
    checkpoints.complete(out, source, config.skip, tokenizer)
    (out / "quant_log.csv").unlink(missing_ok=True)
    checkpoints.require_packed(out, planned, "gptqmodel")
    return out


def _dtype(source: ModelSource, config: Options) -> str:
    """The checkpoint's own dtype: rounding its weights before quantizing them costs accuracy.

    Less float32 for AWQ: gptqmodel packs no AWQ layer from it.
    """
    if isinstance(config, AwqOptions):
        stored = checkpoints.stored_dtype(source, "bfloat16")
        return "bfloat16" if stored == "float32" else stored
    return checkpoints.stored_dtype(source, resolved_dtype(config))
