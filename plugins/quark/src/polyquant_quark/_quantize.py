"""Runs amd-quark: weights are rounded, and exported as Quark does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from polyquant.plugin import Dtype, LoadRequest, WeightInfo, checkpoints, resolved_dtype
from quark.torch import ModelQuantizer, export_safetensors
from quark.torch.quantization.config.config import QConfig, QLayerConfig

from polyquant_quark.options import QuarkOptions
from polyquant_quark.planning import dense_linears


def quantize(request: LoadRequest, config: QuarkOptions, weights: Sequence[WeightInfo], out: Path) -> Path:
    """The dense weights keep the dtype they are stored in."""
    stored = request.source.config.get("dtype") or request.source.config.get("torch_dtype")
    model = checkpoints.load_causal_lm(request, stored if stored in get_args(Dtype) else resolved_dtype(config))
    layers = QLayerConfig(weight=config.native())
    scheme = QConfig(global_quant_config=layers, exclude=dense_linears(weights, config))
    quantizer = ModelQuantizer(scheme)
    with torch.no_grad():
        model = quantizer.freeze(quantizer.quantize_model(model, None))
        export_safetensors(model, str(out))
    checkpoints.load_tokenizer(request.source, trust_remote_code=request.trust_remote_code).save_pretrained(out)
    return out
