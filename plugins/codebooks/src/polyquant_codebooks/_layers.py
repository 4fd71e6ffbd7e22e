"""How layers of the formats are made of a checkpoint's tensors, and how they are described."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.plugin import LayerInfo
from polyquant.plugin.layers import Quantized, describe, layer_tensors, prepare_for_training
from torch import Tensor

from polyquant_codebooks._modules import CodebookLinear
from polyquant_codebooks.exl3._modules import Exl3Linear
from polyquant_codebooks.exl3.options import Exl3Options
from polyquant_codebooks.higgs._modules import HiggsLinear
from polyquant_codebooks.higgs.options import HiggsOptions
from polyquant_codebooks.options import CodebookOptions
from polyquant_codebooks.spqr._modules import SpqrLinear
from polyquant_codebooks.spqr.options import SpqrOptions
from polyquant_codebooks.vptq._modules import VptqLinear
from polyquant_codebooks.vptq.options import VptqOptions

__all__ = ["prepare_for_training"]  # freezing is all that adapters need
MODULES: Mapping[type[CodebookOptions], type[CodebookLinear]] = {
    VptqOptions: VptqLinear, HiggsOptions: HiggsLinear, SpqrOptions: SpqrLinear, Exl3Options: Exl3Linear,
}  # fmt: skip


def describe_layers(model: Any) -> list[LayerInfo]:
    stored = model.config.quantization_config
    return describe(model, _quantized, skipped=stored.get("skip_modules") or stored.get("modules_to_not_convert") or ())


def linear_from_tensors(
    name: str, linear: Any, config: CodebookOptions, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> CodebookLinear:
    """A layer of stored tensors. Raises ModelError where they are wrong."""
    kind = MODULES[type(config)]
    try:
        found = layer_tensors(linear, tensors, kind.parts(config, name, linear, tensors))
    except ValueError as error:
        raise ModelError(str(error)) from error
    if "bias" in found:
        found["bias"] = found["bias"].to(dtype)
    return kind(linear, found, config, name)


def _quantized(name: str, module: Any) -> Quantized | None:
    if not isinstance(module, CodebookLinear):
        return None
    return Quantized((module.out_features, module.in_features), module.bits, module.scheme, module.kernel)
