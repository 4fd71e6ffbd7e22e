"""Loads a GGUF as it is, or a dense checkpoint quantized on the way."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from polyquant.errors import ModelError
from polyquant.plugin import LoadedModel, LoadRequest, checkpoints, resolved_dtype
from polyquant.plugin.gguf import BlockType, read_header
from polyquant.plugin.layers import LinearExperts, is_finite, rows_of

from polyquant_gguf import _modules
from polyquant_gguf._quantize import quantize
from polyquant_gguf._read import build, tokenizer_of
from polyquant_gguf._write import save, write_unpacked
from polyquant_gguf.names import rules_of
from polyquant_gguf.options import GgufOptions
from polyquant_gguf.planning import quantized_types

__all__ = ["load", "save", "write_unpacked"]
KERNEL = "torch dequantize"


def load(request: LoadRequest, config: GgufOptions) -> LoadedModel:
    source = request.source
    if source.gguf_file:
        return _from_file(request, config)
    if source.stored_quantization:
        raise ModelError(
            f"{source.name}: a packed model saved by transformers cannot be read; name the .gguf file instead"
        )
    return LoadedModel(model=_on_the_fly(request, config), config=config, kernel=KERNEL)


def _from_file(request: LoadRequest, config: GgufOptions) -> LoadedModel:
    path = request.source.path / request.source.gguf_file
    header = read_header(path)  # before transformers reads the file: it trusts what it reads
    rules_of(header)
    if config.type == "file":
        config = msgspec.structs.replace(config, file=str(path))
    tokenizer = tokenizer_of(request, header)  # first: its reading takes more memory for a moment than the weights
    model = build(request, header, config)
    checkpoints.place(model, request)
    return LoadedModel(model=model.eval(), tokenizer=tokenizer, config=config, kernel=KERNEL)


def _on_the_fly(request: LoadRequest, config: GgufOptions) -> Any:
    """Quantized from the dtype the checkpoint is stored in."""
    wanted = resolved_dtype(config)
    dtype, types = getattr(torch, wanted), quantized_types(request.weights, config)
    transposed = {weight.name: weight.stacked == "in_out" for weight in request.weights if weight.stacked}

    def pack(name: str, dense: Any) -> Any:
        if isinstance(dense, torch.Tensor):
            return _experts(dense, types[name], transposed=transposed[name])
        block = types[f"{name}.weight"]
        return _modules.packed_like(dense, quantize(rows_of(dense), block), block, dtype)

    def share(model: Any) -> None:
        _modules.share_tied(model, checkpoints.tied_tensors(model), dtype)

    names = [name.removesuffix(".weight") for name in types]
    return checkpoints.quantize_layers(request, wanted, names, pack, after=share, by_rows=True).eval()


def _experts(dense: torch.Tensor, block: BlockType, *, transposed: bool) -> LinearExperts:
    """dense: (experts, out_features, in_features), the last two the other way round where transposed."""
    rows = dense.detach().transpose(1, 2) if transposed else dense.detach()
    if not is_finite(dense):
        raise ModelError("an expert holds NaN or infinity; the checkpoint is damaged")
    packed = torch.stack([quantize(matrix, block) for matrix in rows])
    return _modules.experts_of(packed, block, transposed=transposed)
