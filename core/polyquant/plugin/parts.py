"""The tensors of packed layers, held against the layers before a library or a kernel reads them. Imports torch.

A native kernel reads as far as the layer's sizes say, whatever the tensors hold: one that is too short ends the
process, and a wrong one gives another model. A backend declares what a layer consists of as `Part`s; the check is here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from math import isfinite
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from polyquant.errors import ModelError
from polyquant.models.headers import StoredTensor, read_safetensors
from polyquant.request import LoadRequest
from polyquant.types import WeightInfo

FLOATS = ("float32", "bfloat16", "float16")
MOST_EXPONENT = 254  # of an e8m0 scale that is stored as a byte; 255 stands for NaN


class Part(NamedTuple):
    """A tensor of a packed layer, as a checkpoint has to hold it."""

    shape: tuple[int, ...] | None  # None: any
    dtype: str  # torch's name, or several with ' or ' between; 'float' for any of 32 or 16 bits
    least: float | None = None  # of its values; what is floating point is finite in any case
    most: float | None = None
    optional: bool = False


Expected = Mapping[str, Part | tuple[tuple[int, ...], str]]
"""Name of a tensor inside its layer -> what it has to be; a plain tuple is shape and dtype."""


def layer_tensors(linear: Any, tensors: Mapping[str, Tensor], expected: Expected) -> dict[str, Tensor]:
    """A checkpoint's tensors of a layer that takes the place of `linear`, in the shapes that are expected.

    The bias of `linear` is added to what is expected. Tools differ in axes of length 1, as of the scale of a whole
    weight: (), (1,) or (1, 1). So those need not match.
    Raises ModelError where a tensor is missing or has no place, is of another shape or dtype, or holds impossible
    values: NaN, infinity, or numbers outside of its range.
    """
    size = (linear.out_features, linear.in_features)
    parts = {name: Part(*part) for name, part in expected.items()}
    if linear.bias is not None:
        parts["bias"] = Part((size[0],), "float")
    require_parts(size, tensors, parts)
    return {
        name: tensors[name] if part.shape is None else tensors[name].reshape(part.shape)
        for name, part in parts.items() if name in tensors
    }  # fmt: skip


def require_parts(size: tuple[int, ...], tensors: Mapping[str, Tensor], parts: Mapping[str, Part]) -> None:
    """Raises ModelError as `layer_tensors` does. size: of the layer, (out_features, in_features), for the message."""
    if missing := sorted(name for name, part in parts.items() if name not in tensors and not part.optional):
        raise ModelError(f"{', '.join(missing)} is missing; it has {', '.join(sorted(tensors)) or 'nothing'}")
    if astray := sorted(set(tensors) - set(parts)):
        raise ModelError(f"{', '.join(astray)} has no place beside {', '.join(sorted(parts))}")
    for name, part in parts.items():
        if (tensor := tensors.get(name)) is None:
            continue
        shaped = part.shape is None or _without_ones(tensor.shape) == _without_ones(part.shape)
        if not shaped or dtype_name(tensor) not in _named(part.dtype):
            wanted = f"{'any shape' if part.shape is None else part.shape} {part.dtype}"
            raise ModelError(
                f"{name} of a layer {size} should be {wanted}, and is {tuple(tensor.shape)} {dtype_name(tensor)}"
            )
        if not is_finite(tensor):
            raise ModelError(f"{name} of a layer {size} holds NaN or infinity; the checkpoint is damaged")
        _require_range(name, tensor, part)


def parts_of(layer: Any) -> dict[str, Part]:
    """What an empty layer of a library has to be filled with: its parameters and buffers on the meta device."""
    own = [*layer.named_parameters(), *layer.named_buffers()]
    return {
        name: Part(tuple(tensor.shape), "float" if tensor.is_floating_point() else dtype_name(tensor))
        for name, tensor in own if tensor.is_meta
    }  # fmt: skip


def require_layers(request: LoadRequest, expected: Callable[[WeightInfo, Mapping[str, Tensor]], Expected]) -> None:
    """Hold a checkpoint's packed layers against the model, for a backend whose library reads them by itself.

    A matrix is dense in the checkpoint where its layer has a weight of its shape in floating point, and beside it only
    what it has in the model. Everything else of a layer is what `expected` says of it, given its tensors, which are
    mapped, not read. Raises ModelError, with the names of checkpoint and layer.
    """
    source = request.source
    stored: dict[str, dict[str, tuple[str, str, StoredTensor]]] = defaultdict(dict)
    twice: dict[str, str] = {}
    for file in source.weight_files:
        for key, tensor in read_safetensors(source.path / file).items():
            name = request.names.get(key, key)
            home = layer_of(name.rpartition(".")[0])
            short = name.removeprefix(f"{home}.")
            if short in stored[home]:
                twice[home] = f"it is stored twice, as {stored[home][short][1]} and as {key}"
            stored[home][short] = (file, key, tensor)
    files = {file: safe_open(source.path / file, framework="pt") for file in source.weight_files}
    shapes = {weight.name: weight.shape for weight in request.weights}
    for weight in request.weights:
        name = weight.name.removesuffix(".weight")
        held = stored.get(name, {})
        if name in twice and len(weight.shape) == 2:  # experts that are stored one by one are of three dimensions
            raise ModelError(f"{source.name}: {name} cannot be read: {twice[name]}")
        own = {short for short in held if f"{name}.{short}" in shapes}
        elsewhere = bool(weight.tied_to) and set(held) <= own - {"weight"}  # a tied head may have a bias of its own
        if len(weight.shape) != 2 or not held or elsewhere or _is_dense(held, weight.shape, own):
            continue
        tensors = {short: files[file].get_tensor(key) for short, (file, key, _) in held.items()}
        try:
            parts = {short: Part(*part) for short, part in expected(weight, tensors).items()}
            if (bias := shapes.get(f"{name}.bias")) is not None:
                parts["bias"] = Part(bias, "float")
            require_parts(weight.shape, tensors, parts)
        except ModelError as error:
            raise ModelError(f"{source.name}: {name} cannot be read: {error}") from error


def layer_of(module: str) -> str:
    """The layer that a tensor of `module` belongs to, where parts of a weight are stored as if they were in it."""
    return f"{module}.".partition(".weight.")[0].removesuffix(".")


def stored_metadata(request: LoadRequest) -> dict[str, str]:
    """What the headers of the safetensors files hold beside the tensors; of a layer under the name in the model."""
    layers = {key.rpartition(".")[0]: name.rpartition(".")[0] for key, name in request.names.items()}
    found: dict[str, str] = {}
    for file in request.source.weight_files:
        with safe_open(request.source.path / file, framework="pt") as content:
            for key, text in (content.metadata() or {}).items():
                layer, _, short = key.rpartition(".")
                found[f"{layers.get(layer, layer)}.{short}" if layer else key] = text
    return found


def dtype_name(tensor: Tensor) -> str:
    """As torch names it, without its module: 'float32'."""
    return str(tensor.dtype).removeprefix("torch.")


def require_finite(weight: Tensor) -> Tensor:
    """A dense weight, or some of it. Raises ModelError where it holds NaN or infinity."""
    if not is_finite(weight):
        raise ModelError("it holds NaN or infinity; the checkpoint is damaged")
    return weight


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity; types of one byte are looked up by their bits.

    By its least and its largest number: torch.isfinite makes a copy of all, and two masks.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() > 1:
        return all(isfinite(edge.item()) for edge in tensor.detach().aminmax())
    codes = tensor.contiguous().view(torch.uint8)
    return not any(bool((codes == code).any()) for code in _not_finite(tensor.dtype))


def _is_dense(held: Mapping[str, tuple[str, str, StoredTensor]], shape: tuple[int, ...], own: Collection[str]) -> bool:
    weight = held["weight"][2] if "weight" in held else None
    same = weight is not None and weight.dtype in FLOATS and weight.shape == shape
    return same and set(held) <= {"weight", "bias", *own}


def _require_range(name: str, tensor: Tensor, part: Part) -> None:
    if (part.least is None and part.most is None) or not tensor.numel():
        return
    least, most = tensor.min().item(), tensor.max().item()
    if (part.least is not None and least < part.least) or (part.most is not None and most > part.most):
        raise ModelError(f"{name} holds {least} to {most}, and {part.least} to {part.most} is possible")


def _named(dtype: str) -> Iterable[str]:
    return FLOATS if dtype == "float" else dtype.split(" or ")


def _without_ones(shape: Iterable[int]) -> list[int]:
    return [length for length in shape if length != 1]


@cache
def _not_finite(dtype: torch.dtype) -> list[int]:
    """The bytes that are NaN or infinity in a floating point type of one byte."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes: list[int] = torch.nonzero(~torch.isfinite(numbers)).flatten().tolist()
    return codes
