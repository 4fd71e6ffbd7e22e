"""Reads checkpoints into packed layers: every tensor is checked by name and shape on the way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch
from polyquant import compat, hf, packed
from polyquant.errors import ModelError
from polyquant.loaded import LoadedModel
from polyquant.memory.planned import is_linear
from polyquant.memory.weights import list_weights
from polyquant.options import resolved_dtype
from polyquant.request import LoadRequest, ModelSource
from polyquant.types import WeightInfo
from tqdm import tqdm

from polyquant_auto_round._kernels import FAST_BITS, empty_layer, is_fast, settle
from polyquant_auto_round._layers import kernel
from polyquant_auto_round.options import AutoRoundOptions, packing
from polyquant_auto_round.planning import plan_layers

OBSOLETE = r"rotary_emb\.inv_freq$"  # older transformers stored it; it follows from the config


def load(request: LoadRequest, config: AutoRoundOptions) -> LoadedModel:
    source, dtype = request.source, getattr(torch, resolved_dtype(config))
    model = packed.empty_causal_lm(request, resolved_dtype(config))
    weights = list_weights(model)
    quantized = {name.rpartition(".")[0] for name in packed.tensor_names(source) if name.endswith(".qweight")}
    config, notes = _as_stored(config, weights, quantized, source)
    plan_layers(weights, config)  # refuses layers that cannot be packed
    layout = packing(source.stored_quantization)
    for name in sorted(quantized):
        layer = empty_layer(model.get_submodule(name), layout, config)
        layer.polyquant_scheme = config.scheme
        model.set_submodule(name, layer)
    packed.fill(model, dict(_tensors(model, quantized, source, dtype)), source)
    model.to(packed.single_device(request))
    for name in tqdm(sorted(quantized), desc="Repacking", unit="layer", disable=not request.progress):
        settle(model.get_submodule(name), name)
    model.config.quantization_config = config.stored()
    if not is_fast(config.bits):
        notes.append(_slow(config.bits))
    tokenizer = hf.load_tokenizer(source, trust_remote_code=request.trust_remote_code)
    return LoadedModel(model=model, tokenizer=tokenizer, config=config, kernel=kernel(config.bits), notes=notes)


def _slow(bits: int) -> str:
    why = "auto-round-lib is not there" if bits in FAST_BITS else f"auto-round-lib has no kernel for {bits} bits"
    return f"{why}: weights are unpacked in every forward pass, about ten times slower to generate with"


def _as_stored(
    config: AutoRoundOptions, weights: Sequence[WeightInfo], quantized: set[str], source: ModelSource
) -> tuple[AutoRoundOptions, list[str]]:
    """The options with `skip` as the tensors of the checkpoint have it. Raises ModelError where they do not fit."""
    anything = msgspec.structs.replace(config, skip=(), skip_defaults=False)
    linears = [_module(weight) for weight in weights if is_linear(weight, anything)]
    if astray := sorted(quantized.difference(linears)):
        raise ModelError(
            f"{source.name}: {len(astray)} quantized layers have no Linear module in the model: {', '.join(astray[:3])}"
        )
    if not quantized:
        raise ModelError(f"{source.name}: its config says that it is quantized, and it has no tensor *.qweight")
    if quantized == {_module(weight) for weight in weights if is_linear(weight, config)}:
        return config, []
    dense = tuple(name for name in linears if name not in quantized)
    note = f"{len(dense)} layers are dense in the checkpoint: {', '.join(dense[:3])}"
    return msgspec.structs.replace(config, skip=dense, skip_defaults=False), [note] if dense else []


def _module(weight: WeightInfo) -> str:
    return weight.name.rpartition(".")[0]


def _tensors(
    model: Any, quantized: set[str], source: ModelSource, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors in the dtypes in which they are kept, less those that transformers leaves out too.

    Raises ModelError where columns are reordered.
    """
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), OBSOLETE]
    tied = compat.tied_tensors(model)
    for name, tensor in packed.read_tensors(source):
        owner, _, short = name.rpartition(".")
        if name in tied or any(re.search(pattern, name) for pattern in patterns):
            continue
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
