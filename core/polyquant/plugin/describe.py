"""Describes a loaded model's tensors. A backend says which modules it quantized; the bytes are counted here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from polyquant.memory.adapted import base_name, is_adapters, unwrapped
from polyquant.memory.packed import VOCABULARY_SCHEMES
from polyquant.memory.storage import walk
from polyquant.models import versions
from polyquant.models.roles import ALWAYS_DENSE, REASONS, SKIPPED, TIED, beside_the_language_model, role_of
from polyquant.packed_weights import kernels
from polyquant.packed_weights.experts import RepackedExperts
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.packed_weights.vocabulary import RepackedEmbedding
from polyquant.types import LayerInfo, Role


class Quantized(NamedTuple):
    """What a backend knows of a module it quantized."""

    shape: tuple[int, ...]  # of the weight before packing
    bits: float
    scheme: str
    kernel: str
    tensor: str = "weight"  # name of the weight inside the module; empty: the module stands for the tensor itself
    dense: tuple[str, ...] = ("bias",)  # tensors of the module that are not part of the quantized weight
    role: Role | None = None  # left out: linear, or experts where the shape has three sizes


def describe(
    model: Any, quantized: Callable[[str, Any], Quantized | None], *, skipped: Collection[str] = ()
) -> list[LayerInfo]:
    """One LayerInfo for every parameter and buffer; all storage of a quantized module goes to its weight.

    quantized: called with each module's name and the module; None for one that is not quantized.
    skipped: names of modules that the user asked to keep dense.
    """
    parts: dict[str, dict[str, int]] = {}
    devices: dict[str, str] = {}
    head, tied = unwrapped(model.get_output_embeddings()), versions.tied_tensors(model)
    for stored in walk(model, {origin.rpartition(".")[0] for origin in tied.values()}):
        parts.setdefault(stored.module, {})[stored.attribute] = stored.nbytes
        devices.setdefault(stored.module, stored.device)
    is_tower, layers = beside_the_language_model(model), list[LayerInfo]()
    for name, module in model.named_modules():
        remaining = parts.get(name, {})
        found = _repacked(module, head) or quantized(name, module)
        if isinstance(module, RepackedLinear) and module.is_tied:
            layers.append(_tied(name, module, tied))
            continue
        for short, tensor, is_buffer in _own_tensors(module, found):
            whole = f"{name}.{short}" if name else short
            origin = "" if is_adapters(whole) else tied.get(base_name(whole), "")
            owned = {
                path: remaining.pop(path) for path in list(remaining) if path == short or path.startswith(f"{short}.")
            }
            if (
                not owned
                and not origin
                and tensor.numel()
                and tensor.device.type != "meta"
                and not _is_parameter(module, short)
            ):
                continue  # a second name of a storage that is described already
            role = role_of(tensor, module, head=head, is_buffer=is_buffer, tower=is_tower(name))
            dtype = str(tensor.dtype).removeprefix("torch.")
            reason = (
                TIED.format(origin)
                if origin
                else SKIPPED
                if base_name(name) in skipped and role not in ALWAYS_DENSE
                else REASONS[role]
            )
            layers.append(
                LayerInfo(
                    name=whole, shape=tuple(tensor.shape), role=role, bits=8 * tensor.element_size(), scheme=dtype,
                    stored_bytes=sum(owned.values()), parts=owned, device=str(tensor.device), quantized=False,
                    reason=reason,
                )
            )  # fmt: skip
        if found:
            layers.append(
                LayerInfo(
                    name=f"{name}.{found.tensor}".rstrip("."), shape=found.shape,
                    role=found.role or ("experts" if len(found.shape) == 3 else "linear"),
                    bits=found.bits, scheme=found.scheme, stored_bytes=sum(remaining.values()), parts=dict(remaining),
                    device=devices.get(name, "meta"), quantized=True, kernel=found.kernel,
                )
            )  # fmt: skip
    return layers


def _repacked(module: Any, head: Any) -> Quantized | None:
    """What the core has packed itself; None for any other module."""
    if isinstance(module, RepackedExperts):
        return Quantized(module.dense_shape, module.bits, module.scheme, kernels.name(), tensor="", role="experts")
    if isinstance(module, RepackedEmbedding):
        role: Role = "embedding"
    elif isinstance(module, RepackedLinear):
        role = "head" if module is head and module.scheme in VOCABULARY_SCHEMES else "linear"
    else:
        return None
    packed = module.packed
    return Quantized(
        packed.shape, module.bits, module.scheme, kernels.name(), dense=("bias", "embed_scale"), role=role
    )  # fmt: skip


def _tied(name: str, module: RepackedLinear, tied: Mapping[str, str]) -> LayerInfo:
    """A head that multiplies with the embedding's own tensors."""
    return LayerInfo(
        name=f"{name}.weight", shape=module.packed.shape, role="head", bits=module.bits, scheme=module.scheme,
        stored_bytes=0, parts={}, device=str(module.qweight.device), quantized=False,
        reason=TIED.format(tied[f"{base_name(name)}.weight"]),
    )  # fmt: skip


def _is_parameter(module: Any, short: str) -> bool:
    return short in module._parameters


def _own_tensors(module: Any, found: Quantized | None) -> list[tuple[str, torch.Tensor, bool]]:
    """(name, tensor, is_buffer) of the dense tensors of a module."""
    tensors = [(name, tensor, False) for name, tensor in module._parameters.items()]
    tensors += [(name, tensor, True) for name, tensor in module._buffers.items()]
    if found is None:
        known = {name for name, _, _ in tensors}
        plain = [(name, value, True) for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
        tensors += [entry for entry in plain if entry[0] not in known]
    return [entry for entry in tensors if entry[1] is not None and (found is None or entry[0] in found.dense)]
