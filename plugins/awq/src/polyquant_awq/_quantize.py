"""Makes AWQ checkpoints with gptqmodel."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from polyquant.errors import SaveError
from polyquant.memory.weights import list_weights
from polyquant.models import hf
from polyquant.plugin import LoadRequest, ModelSource, checkpoints, resolved_dtype
from polyquant.plugin.calibration import token_windows
from polyquant.plugin.checkpoints import check_folder
from polyquant.plugin.process import run_in_process

from polyquant_awq.options import AwqOptions
from polyquant_awq.planning import plan_layers

WINDOW_TOKENS, WINDOWS = 512, 128  # of calibration text, at most
WORKERS = str(max(2, min(12, (os.cpu_count() or 1) // 2)))  # its default is 1 on two cores, and then it fails


def quantize(request: LoadRequest, config: AwqOptions, calibration: Sequence[str], out: Path) -> Path:
    source, trusted = request.source, request.trust_remote_code
    weights = list_weights(hf.skeleton(source, resolved_dtype(config), trust_remote_code=trusted))
    checkpoints.require_linears(weights, config)
    planned = [plan.name.rpartition(".")[0] for plan in plan_layers(weights, config) if plan.quantized]
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=trusted)
    windows = token_windows(tokenizer, calibration, length=WINDOW_TOKENS, count=WINDOWS)
    job = {
        "model": str(source.path.absolute()), "device": request.device, "dtype": _dtype(source),
        "trusted": trusted, "options": config, "windows": windows, "out": str(out.absolute()),
    }  # fmt: skip
    run_in_process("polyquant_awq._worker", job, shown=request.progress, environment={"GPTQMODEL_CPU_WORKERS": WORKERS})
    checkpoints.complete(out, source, config.skip, tokenizer)
    (out / "quant_log.csv").unlink(missing_ok=True)
    written = checkpoints.packed_modules(check_folder(out, str(out)), ("qweight",))
    if left := [name for name in planned if name not in written]:
        raise SaveError(f"gptqmodel left {len(left)} of {len(planned)} layers dense: {', '.join(left[:3])}")
    return out


def _dtype(source: ModelSource) -> str:
    """The checkpoint's own dtype, less float32, which gptqmodel packs no AWQ layer from."""
    stored = source.config.get("dtype") or source.config.get("torch_dtype")
    return stored if stored in ("bfloat16", "float16") else "bfloat16"
