"""What is checked of a checkpoint before transformers reads it: tensors, and how torchao is to put them together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from polyquant.errors import ModelError
from polyquant.plugin import LoadRequest, WeightInfo
from polyquant.plugin.parts import FLOATS, Expected, Part, require_layers, stored_metadata
from torch import Tensor

from polyquant_torchao._layers import NAMES
from polyquant_torchao.options import TorchAoOptions

CODES = {"int8": ("int8", -128, 127), "int4": ("int8", -8, 7), "float8": ("float8_e4m3fn", None, None)}
"""Weights -> dtype of the codes, and their range."""


def require_sound(request: LoadRequest, config: TorchAoOptions) -> None:
    """Raises ModelError where a tensor, or torchao's description of one, does not fit its layer."""
    described = stored_metadata(request)

    def expected(weight: WeightInfo, _: Mapping[str, Tensor]) -> Expected:
        rows, columns = weight.shape
        size = config.group_size or columns
        names = _described(described.get(weight.name, ""), config, [1, size])
        dtype, least, most = CODES[config.weights]
        parts = {
            "_weight_qdata": Part((rows, columns), dtype, least, most),
            "_weight_scale": Part((rows, columns // size), "float"),
        }
        if "zero_point" in names:
            parts["_weight_zero_point"] = Part((rows, columns // size), "int8", least, most)
        if {f"_weight_{name}" for name in names} != set(parts):
            raise ModelError(f"the header's metadata give its weight the parts {', '.join(names)}")
        return parts

    require_layers(request, expected)


def _described(text: str, config: TorchAoOptions, block: list[int]) -> list[str]:
    """The parts of a weight. text: its tensor subclass and attributes, JSON, as torchao writes them into the header.

    Raises ModelError where those are not what the config and the layer make of them.
    """
    try:
        found: Any = json.loads(text)
        kind, data = found["_type"], found["_data"]
        size, dtype = data["block_size"], data["dtype"]["_data"]
        names = [str(name) for name in found["_tensor_data_names"]]
        target = data["target_dtype"]["_data"] if config.weights == "int4" else ""
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ModelError(f"the header's metadata do not describe its weight: {text!r:.80}") from error
    wanted = NAMES.get(str(kind))
    if wanted is None or wanted.partition("-")[0] != config.weights:
        raise ModelError(f"the header's metadata make its weight a {kind}, and the config says {config.weights}")
    if size != block or dtype not in FLOATS or target not in ("", "int4"):
        raise ModelError(
            f"the header's metadata give its weight blocks of {size}, {dtype} {target}; blocks of {block} were expected"
        )
    return names
