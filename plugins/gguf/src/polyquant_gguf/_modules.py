"""A linear layer, an embedding and experts whose weights stay blocks; each forward pass dequantizes what it uses."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from polyquant.plugin.gguf import BlockType
from polyquant.plugin.layers import LinearExperts, frozen_linear, rows_at_a_time
from torch import Tensor, nn

from polyquant_gguf._decode import dequantize


class Packed(nn.Module):
    """A matrix of blocks: uint8 (rows, bytes a row); for F32, F16 and BF16 the numbers, (rows, in_features)."""

    weight: nn.Parameter

    def __init__(self, weight: Tensor | nn.Parameter, block: BlockType) -> None:
        super().__init__()
        self.block = block
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)

    @property
    def columns(self) -> int:
        """Weights in a row."""
        return int(self.weight.shape[1]) // (self.block.nbytes if self.block.packed else 1) * self.block.elements

    @property
    def logical_shape(self) -> tuple[int, int]:
        """Of the weight before packing."""
        return int(self.weight.shape[0]), self.columns

    def dequantize(self) -> Tensor:
        """The weight, `logical_shape`, float32."""
        return self.numbers(self.weight.detach(), torch.float32)

    def numbers(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of `weight`, dequantized."""
        return dequantize(rows, self.block, dtype) if self.block.packed else rows.to(dtype)


class PackedLinear(Packed):
    """y = x W^T + b; x (..., in_features), y (..., out_features) in the dtype of x."""

    def __init__(self, weight: Tensor | nn.Parameter, block: BlockType, bias: nn.Parameter | None = None) -> None:
        super().__init__(weight, block)
        self.out_features, self.in_features = self.logical_shape
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, partial(self._pieces, x.dtype), self.bias)

    def _pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        step = rows_at_a_time(self.in_features, self.weight.device) if self.block.packed else self.out_features
        return (self.numbers(rows, dtype) for rows in self.weight.split(step))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, type={self.block.name}"


class PackedEmbedding(Packed):
    """Rows of the table for token ids, (...) to (..., embedding_dim); only those rows are dequantized."""

    def __init__(self, weight: Tensor | nn.Parameter, block: BlockType, dtype: torch.dtype, scale: Any = None) -> None:
        super().__init__(weight, block)
        self.num_embeddings, self.embedding_dim = self.logical_shape
        self.dtype = dtype
        self.register_buffer("embed_scale", scale, persistent=False)  # Gemma's

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.numbers(self.weight.index_select(0, ids.reshape(-1)), self.dtype)
        found = rows.view(*ids.shape, self.embedding_dim)
        return found if self.embed_scale is None else found * self.embed_scale.to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, type={self.block.name}"


def experts_of(weight: Tensor, block: BlockType, *, transposed: bool) -> LinearExperts:
    """A matrix of each expert. weight: uint8 (experts, out_features, bytes a row).

    transposed: whether it stands for a tensor (experts, in_features, out_features).
    """
    return LinearExperts(PackedLinear(weight[0].to("meta"), block), {"weight": weight}, transposed=transposed)


class Held(NamedTuple):
    """A tensor of a model: the parameter, the shape that it stands for, and its blocks; None: it is dense."""

    parameter: Tensor
    shape: tuple[int, ...]
    block: BlockType | None


def held_tensors(model: Any, without: dict[str, str]) -> dict[str, Held]:
    """The tensors of a model, by the names that dense ones have. without: names that are left out."""
    held = dict[str, Held]()
    for name, parameter in model.named_parameters():
        home = name.rpartition(".")[0]
        owner = model.get_submodule(home)
        if name in without:
            continue
        if isinstance(owner, LinearExperts):
            held[home] = Held(parameter.detach(), owner.dense_shape, owner.like.block)
        elif isinstance(owner, Packed) and parameter is owner.weight:
            held[name] = Held(parameter.detach(), owner.logical_shape, owner.block)
        else:
            held[name] = Held(parameter.detach(), tuple(parameter.shape), None)
    return held


def packed_like(module: nn.Module, weight: Tensor | nn.Parameter, block: BlockType, dtype: torch.dtype) -> Packed:
    """The module with `weight` that takes the place of a dense or packed one.

    Raises TypeError where that is neither a linear layer nor an embedding.
    """
    if isinstance(module, (nn.Linear, PackedLinear)):
        return PackedLinear(weight, block, module.bias)
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(weight, block, dtype, getattr(module, "embed_scale", None))
    raise TypeError(f"it belongs to a {type(module).__name__}, which cannot be packed")


def replace(model: nn.Module, name: str, weight: Tensor | nn.Parameter, block: BlockType, dtype: torch.dtype) -> None:
    """Put `weight` in place of the dense matrix `name`, such as model.layers.0.mlp.up_proj.weight."""
    module = name.removesuffix(".weight")
    model.set_submodule(module, packed_like(model.get_submodule(module), weight, block, dtype))


def share_tied(model: nn.Module, tied: dict[str, str], dtype: torch.dtype) -> None:
    """Let each tied tensor be its origin's, packed or not. tied: name -> origin; a bias may be tied, as BERT's is."""
    for name, origin in tied.items():
        (module, _, own), (home_name, _, short) = name.rpartition("."), origin.rpartition(".")
        home = model.get_submodule(home_name)
        if isinstance(home, Packed) and short == "weight":
            replace(model, name, home.weight, home.block, dtype)
        else:
            setattr(model.get_submodule(module), own, getattr(home, short))
