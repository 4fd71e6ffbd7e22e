"""How packed modules store their weights."""

from __future__ import annotations

from typing import Any

import msgspec
from polyquant.plugin import TIED, LayerInfo, Role
from polyquant.plugin.gguf import FLOAT_DTYPES
from polyquant.plugin.layers import LinearExperts, Quantized, describe

from polyquant_gguf._load import KERNEL
from polyquant_gguf._modules import Packed, PackedEmbedding
from polyquant_gguf._pack import pack, unpack
from polyquant_gguf.planning import IN_FILE

__all__ = ["describe_layers", "pack", "unpack"]
GGUF_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


def describe_layers(model: Any) -> list[LayerInfo]:
    modules = {f"{name}.weight": module for name, module in model.named_modules()}
    config = getattr(model.config, "quantization_config", None) or {}
    from_file = config.get("type") == "file"
    layers = describe(model, _quantized(model), skipped=config.get("skip", ()))
    head = model.get_output_embeddings()
    refined = [_refined(layer, modules.get(layer.name), head) for layer in layers]
    return [_with_reason(layer) for layer in refined] if from_file else refined


def _quantized(model: Any) -> Any:
    """Each storage belongs to the first module that has it: a head tied to the embedding is the embedding's."""
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            first.setdefault(id(module.weight), name)

    def quantized(name: str, module: Any) -> Quantized | None:
        if isinstance(module, LinearExperts):
            block = module.like.block
            return Quantized(module.dense_shape, block.bits, block.name, KERNEL, tensor="", role="experts")
        if not isinstance(module, Packed) or not module.block.packed or first[id(module.weight)] != name:
            return None
        return Quantized(
            module.logical_shape, module.block.bits, module.block.name, KERNEL, dense=("bias", "embed_scale")
        )

    return quantized


def _refined(layer: LayerInfo, module: Any, head: Any) -> LayerInfo:
    """The parts of a matrix's description that its class name and bytes do not tell."""
    if not isinstance(module, Packed):  # with kernel="packed" the core's own layer, which knows no heads
        own = layer.quantized and module is not None and module is head
        return msgspec.structs.replace(layer, role="head") if own else layer
    role: Role = "head" if module is head else "embedding" if isinstance(module, PackedEmbedding) else "linear"
    scheme = module.block.name if module.block.packed else layer.scheme
    return msgspec.structs.replace(layer, role=role, shape=module.logical_shape, bits=module.block.bits, scheme=scheme)


def _with_reason(layer: LayerInfo) -> LayerInfo:
    """A matrix of a GGUF is dense because the file holds it so."""
    if layer.quantized or layer.role not in ("linear", "head", "embedding") or layer.reason.startswith(TIED[:8]):
        return layer
    return msgspec.structs.replace(layer, reason=IN_FILE.format(GGUF_NAMES.get(layer.scheme, layer.scheme)))
