"""Reads checkpoints into packed layers: every tensor is checked by name and shape on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from polyquant.errors import ModelError
from polyquant.memory.weights import list_weights
from polyquant.plugin import LoadedModel, LoadRequest, ModelSource, checkpoints, resolved_dtype
from tqdm import tqdm

from polyquant_auto_round import _kernels
from polyquant_auto_round._kernels import FAST_BITS, empty_layer, is_fast, settle
from polyquant_auto_round.options import AutoRoundOptions, packing
from polyquant_auto_round.planning import plan_layers


def load(request: LoadRequest, config: AutoRoundOptions) -> LoadedModel:
    source, dtype = request.source, getattr(torch, resolved_dtype(config))
    tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=request.trust_remote_code)
    model = checkpoints.empty_causal_lm(request, resolved_dtype(config))
    weights = list_weights(model)
    quantized = checkpoints.packed_modules(source, ("qweight", "qzeros", "scales"))
    config, notes = checkpoints.with_stored_skips(config, weights, quantized, source)
    plan_layers(weights, config)  # refuses layers that cannot be packed
    layout = packing(source.stored_quantization)
    for name in sorted(quantized):
        layer = empty_layer(model.get_submodule(name), layout, config)
        layer.polyquant_scheme = config.scheme
        model.set_submodule(name, layer)
    checkpoints.fill(model, dict(_tensors(model, quantized, source, dtype)), source)
    model.to(checkpoints.single_device(request))
    for name in tqdm(sorted(quantized), desc="Repacking", unit="layer", disable=not request.progress):
        settle(model.get_submodule(name), name)
    model.config.quantization_config = config.stored()
    if not is_fast(config.bits):
        notes.append(_slow(config.bits))
    kernel = _kernels.name(config.bits)
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=kernel, notes=notes)


def _slow(bits: int) -> str:
    why = "auto-round-lib is not there" if bits in FAST_BITS else f"auto-round-lib has no kernel for {bits} bits"
    return f"{why}: weights are unpacked in every forward pass, about ten times slower to generate with"


def _tensors(
    model: Any, quantized: set[str], source: ModelSource, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors in the dtypes in which they are kept. Raises ModelError where columns are reordered."""
    for name, tensor in checkpoints.own_tensors(model, source):
        owner, _, short = name.rpartition(".")
        if owner in quantized and short == "g_idx":
            layer = model.get_submodule(owner)
            if not torch.equal(tensor.long(), torch.arange(layer.infeatures) // layer.group_size):
                raise ModelError(f"{source.name}: columns of {owner} are reordered; load it with backend='gptq'")
        elif owner in quantized and short in ("qweight", "qzeros"):
            yield name, tensor
        elif owner in quantized and model.get_submodule(owner).bias is None and short == "bias" and not tensor.any():
            continue  # auto-gptq wrote biases of zeros for layers that have none
        elif owner in quantized and is_fast(model.get_submodule(owner).bits):
            yield name, tensor.float()  # as auto-round-lib keeps them
        else:
            yield name, tensor.to(dtype)
