"""Makes checkpoints with amd-quark: weights are rounded to nearest, and exported as Quark does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from polyquant.errors import ConfigError
from polyquant.plugin import LoadRequest, checkpoints, dense_linears, require_library, resolved_dtype

from polyquant_quark._library import AMD_QUARK, quiet_quark, tensor_config, wait_for_kernels
from polyquant_quark.options import QuarkOptions
from polyquant_quark.planning import plan_layers


def quantize(request: LoadRequest, config: QuarkOptions, calibration: Sequence[str], out: Path) -> Path:
    """The dense weights keep the dtype they are stored in.

    Raises ConfigError for what makes no checkpoint, EnvironmentProblem where amd-quark is not there or fails.
    """
    if calibration:
        raise ConfigError(
            "Quark rounds weights to nearest here and uses no calibration text; leave calibration (--calibration) out"
        )
    plan_layers(request.weights, config)  # refuses what does not fit
    if experts := next((weight.name for weight in request.weights if weight.role == "experts"), ""):
        raise ConfigError(
            f"{experts} are fused experts, and amd-quark leaves those dense, most of this model's weights; "
            "choose a backend that takes experts"
        )
    wait_for_kernels()
    with quiet_quark(progress=request.progress):
        require_library(AMD_QUARK, "Quark checkpoints are made with amd-quark")
        _run(request, config, out)
    checkpoints.load_tokenizer(request.source, trust_remote_code=request.trust_remote_code).save_pretrained(out)
    return out


def _run(request: LoadRequest, config: QuarkOptions, out: Path) -> None:
    from quark.torch import ModelQuantizer, export_safetensors
    from quark.torch.quantization.config.config import QConfig, QLayerConfig

    model = checkpoints.load_causal_lm(request, checkpoints.stored_dtype(request.source, resolved_dtype(config)))
    layers = QLayerConfig(weight=tensor_config(config))
    scheme = QConfig(global_quant_config=layers, exclude=dense_linears(request.weights, config))
    quantizer = ModelQuantizer(scheme)
    with torch.no_grad():
        model = quantizer.freeze(quantizer.quantize_model(model, None))
        export_safetensors(model, str(out))
