"""Bytes of each tensor: from the file's own types, or from shapes for a checkpoint that is quantized while loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import msgspec
from polyquant.errors import ConfigError
from polyquant.plugin import LayerPlan, PackedFormat, WeightInfo, module_of, plan_dense, unfit
from polyquant.plugin.gguf import FLOAT_DTYPES, TYPES, BlockType, read_header

from polyquant_gguf.names import SHARED_GATE, place
from polyquant_gguf.options import GgufOptions

IN_FILE = "the file holds it as {}, no blocks"
LAYOUTS: Mapping[str, PackedFormat] = {
    "Q4_0": PackedFormat(kind="affine4", group_size=32),
    "Q4_1": PackedFormat(kind="affine4", group_size=32, offsets="minima"),
    "Q5_0": PackedFormat(kind="int8", group_size=32),
    "Q5_1": PackedFormat(kind="int8", group_size=32, offsets="minima"),
    "Q8_0": PackedFormat(kind="int8", group_size=32),
    "Q4_K": PackedFormat(kind="affine4", group_size=32, scale_dtype="int8", offsets="minima", outer_group=256),
    "Q5_K": PackedFormat(kind="int8", group_size=32, scale_dtype="int8", offsets="minima", outer_group=256),
    "Q6_K": PackedFormat(kind="int8", group_size=16, scale_dtype="int8", outer_group=256),
    "IQ4_NL": PackedFormat(kind="codebook4", group_size=32),
    "MXFP4": PackedFormat(kind="codebook4", group_size=32, scale_dtype="bfloat16"),  # powers of two, down to 2**-128
    "NVFP4": PackedFormat(kind="codebook4", group_size=16),
}
"""Block type -> its weights with kernel="packed", nothing rounded. The others would take far more memory there."""


def plan_layers(weights: Sequence[WeightInfo], config: GgufOptions) -> list[LayerPlan]:
    types = file_types(weights, config) if config.type == "file" else quantized_types(weights, config)
    return [
        _plan(weight, types[weight.name], config) if weight.name in types else plan_dense(weight, config)
        for weight in weights
    ]


def file_types(weights: Sequence[WeightInfo], config: GgufOptions) -> dict[str, BlockType]:
    """Matrix name -> its type in the file. Raises ConfigError where the options name no file."""
    if not config.file:
        raise ConfigError("type 'file' takes its types from a GGUF: give one as the model, or name it with file=")
    shapes = {weight.name: weight.shape for weight in weights if weight.role != "buffer" and not weight.tied_to}
    placed = place(read_header(Path(config.file)), shapes)
    return {
        name: found.type
        for name, found in placed.items()
        if found.holds_blocks and (found.type.packed or not found.is_stack)  # experts without blocks are a plain tensor
    }


def quantized_types(weights: Sequence[WeightInfo], config: GgufOptions) -> dict[str, BlockType]:
    """Matrix name -> the type it is going to have. Raises ConfigError where its rows are not whole blocks."""
    if config.type == "file":
        raise ConfigError("type 'file' is for GGUF files; for a dense checkpoint choose a block type, such as Q4_0")
    types = {}
    for weight in weights:
        chosen = _chosen(weight, config)
        if chosen is None:
            continue
        block = TYPES[chosen]
        if _columns(weight) % block.elements:
            raise _unfit(weight, block, config)
        types[weight.name] = block
    return types


def _unfit(weight: WeightInfo, block: BlockType, config: GgufOptions) -> ConfigError:
    what = f"{block.name} blocks of {block.elements} weights do not divide in_features {_columns(weight)}"
    if config.format_of(weight) is not None:
        return unfit(weight, what, ["another type for it in layers"])
    if weight.role == "embedding":
        return ConfigError(f"{what} in {weight.name} {weight.shape}; use embedding_type='dense'")
    smaller = [f"type={name!r}" for name in ("Q4_0", "Q8_0") if _columns(weight) % TYPES[name].elements == 0]
    return unfit(weight, what, smaller)


def _chosen(weight: WeightInfo, config: GgufOptions) -> str | None:
    """The type for a weight, or None where it stays dense."""
    if weight.tied_to or weight.name.endswith(SHARED_GATE):
        return None
    if weight.stacked:  # a file may have a type for each of a layer's two
        named = dict(config.layers).get(weight.name, config.format_of(weight))
        return named or (None if config.skips(weight) else config.type)
    if len(weight.shape) != 2:
        return None
    if (named := config.format_of(weight)) is not None:
        if not (weight.module == "Linear" or _is_embedding(weight)):
            raise ConfigError(
                f"layers names {module_of(weight)}, a {weight.module}; linear layers and embeddings have block types"
            )
        return named
    if _is_embedding(weight):
        return None if config.embedding_type == "dense" else config.embedding_type
    return config.type if weight.module == "Linear" and not config.skips(weight) else None


def _is_embedding(weight: WeightInfo) -> bool:
    return weight.module == "Embedding" or weight.module.endswith("ScaledWordEmbedding")


def _columns(weight: WeightInfo) -> int:
    """in_features of a matrix, or of those of experts."""
    return weight.shape[1] if weight.stacked == "in_out" else weight.shape[-1]


def _plan(weight: WeightInfo, block: BlockType, config: GgufOptions) -> LayerPlan:
    rows = prod(weight.shape) // _columns(weight)
    if not block.packed:
        dense = plan_dense(msgspec.structs.replace(weight, dtype=FLOAT_DTYPES[block.name]), config)
        return msgspec.structs.replace(dense, reason=IN_FILE.format(block.name))
    return LayerPlan(
        name=weight.name,
        shape=weight.shape,
        role=weight.role,
        stored_bytes=rows * block.row_bytes(_columns(weight)),
        bits=block.bits,
        scheme=block.name,
        quantized=True,
        packed=LAYOUTS.get(block.name),
    )
