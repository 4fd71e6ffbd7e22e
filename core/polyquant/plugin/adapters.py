"""PEFT on packed layers: what it cannot do with them is refused before it begins. Imports torch, and PEFT where asked.

PEFT knows the layers of a few libraries. Of any other it takes `weight` for the dense one, packed or not, and reads it,
adds to it, or copies it to train it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

import torch

from polyquant.errors import UnsupportedOperation
from polyquant.memory.effective import input_dtype
from polyquant.plugin.quantizer import Marked, marked

TOLERANCE = 0.05  # of the largest output: kernels round, other weights are further off than that
PLAIN = ("layer", "tuners_utils")
"""Modules of PEFT, in any of its packages, whose layers add to a dense `weight` or cannot merge. Those of the layers of
quantization libraries are named like these, and dequantize, add and quantize again."""
TAKE_FROM_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin (`init_lora_weights`) that move a part of each base weight into the adapter."""


def guard() -> None:
    """From here on PEFT is asked first, wherever it puts an adapter on a model of ours or merges one into it."""
    from peft.tuners.tuners_utils import BaseTuner

    if not hasattr(BaseTuner.inject_adapter, "__wrapped__"):
        BaseTuner.inject_adapter = _asked_first(BaseTuner.inject_adapter, _require_adaptable)
        BaseTuner._check_merge_allowed = _asked_first(BaseTuner._check_merge_allowed, _require_mergeable)


def _asked_first(method: Callable[..., Any], question: Callable[..., None]) -> Callable[..., Any]:
    @wraps(method)
    def asked(tuner: Any, *arguments: Any, **more: Any) -> Any:
        question(tuner, *arguments, **more)
        return method(tuner, *arguments, **more)

    return asked


def _require_adaptable(tuner: Any, model: Any, adapter_name: str, *ignored: Any, **more: Any) -> None:
    base = marked(model)
    if base is not None:
        require_adaptable(model, base, tuner.peft_config[adapter_name])


def require_adaptable(model: Any, base: Marked, config: Any) -> None:
    """Raises UnsupportedOperation, with the way out, where an adapter's config asks what packed layers cannot give."""
    named = [*(getattr(config, "modules_to_save", None) or ()), *(getattr(config, "target_parameters", None) or ())]
    for name in named:
        for packed in sorted(base.packed):
            if any(part.endswith(name) for part in _parts(packed)):
                raise UnsupportedOperation(
                    f"{name!r} is to be trained as it is, and {packed} is packed by {base.backend}: put adapters on it "
                    f"(target_modules, --targets), or keep it dense when loading: skip=[{packed!r}]"
                )
    start = getattr(config, "init_lora_weights", True)
    targets = _targeted(base, config)
    if targets and isinstance(start, str) and start.startswith(TAKE_FROM_THE_BASE):
        raise UnsupportedOperation(
            f"init_lora_weights={start!r} takes a part of each weight out of the base, and {targets[0]} is packed by "
            f"{base.backend}: leave init_lora_weights at True, or 'gaussian' or 'orthogonal'"
        )
    if getattr(config, "use_dora", False):
        require_readable(model, targets, base.backend)


def require_readable(model: Any, targets: Iterable[str], backend: str) -> None:
    """Raises UnsupportedOperation where PEFT does not find the true weights of the modules `targets`.

    DoRA needs their norms. PEFT dequantizes what it knows, and takes any other `weight` for the dense one, in silence;
    so one layer of each kind is asked what it answers, which must be what PEFT's weight gives.
    """
    layers = {name: _base_layer(model.get_submodule(name)) for name in targets}
    kinds = {type(layer): name for name, layer in reversed(layers.items())}
    for kind, name in kinds.items():
        wrong = _misread(layers[name])
        if wrong:
            raise UnsupportedOperation(
                f"DoRA needs weights that PEFT can read, and those of {backend} are not: {name} ({kind.__name__}), "
                f"{wrong}. Leave it out (dora=False, use_dora=False); rslora=True works on every backend"
            )


def _require_mergeable(tuner: Any, *ignored: Any, **more: Any) -> None:
    """Raises UnsupportedOperation where PEFT would add an adapter's product to a packed weight."""
    base = marked(tuner.model)
    if base is None:
        return
    for name, layer in _adapted(tuner.model):
        if name in base.packed and type(layer).merge.__module__.rpartition(".")[2] in PLAIN:
            raise UnsupportedOperation(
                f"PEFT merges into dense weights, and {name} is packed by {base.backend}: merge with polyquant.merge "
                "(polyquant merge MODEL --adapter DIR --into dequantized --out DIR), or leave the adapter beside the "
                "base, where it computes the same"
            )


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, layer) of PEFT's layers around those of `model`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def _targeted(base: Marked, config: Any) -> list[str]:
    """Packed modules that the adapter goes on; all, where PEFT is to choose."""
    from peft.tuners.tuners_utils import check_target_module_exists

    packed, asked = sorted(base.packed), getattr(config, "target_modules", None)
    if not asked or asked == "all-linear":
        return packed
    return [name for name in packed if check_target_module_exists(config, name)]


def _parts(name: str) -> Iterator[str]:
    """Its weight, and the modules it lies in, itself among them."""
    yield f"{name}.weight"
    pieces = name.split(".")
    yield from (".".join(pieces[:count]) for count in range(1, len(pieces) + 1))


def _base_layer(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _misread(layer: Any) -> str:
    """What is wrong with the weight that PEFT reads from `layer`; empty where it is the true one, time after time."""
    try:
        tried = copy.deepcopy(layer)  # reading, or running, changes the layers of some libraries
    except Exception:  # of a library's tensors; those that cannot be copied are not changed either
        tried = layer
    return next((wrong for _ in range(2) if (wrong := _misread_once(tried))), "")


def _misread_once(layer: Any) -> str:
    from peft.utils.integrations import dequantize_module_weight

    try:
        weight = dequantize_module_weight(layer).detach()
        if tuple(weight.shape) != (layer.out_features, layer.in_features) or not weight.is_floating_point():
            return f"where it finds {tuple(weight.shape)} {weight.dtype}"
        dtype = input_dtype(layer, weight.dtype)
        inputs = torch.linspace(-1, 1, layer.in_features, dtype=dtype, device=weight.device)[None]
        with torch.no_grad():
            given = (layer(inputs) - layer(torch.zeros_like(inputs))).float()
            wanted = torch.nn.functional.linear(inputs.float(), weight.float())
    except Exception as error:  # of the backend's library, or PEFT's
        return f"{type(error).__name__}: {error}"
    distance = float((given - wanted).abs().max() / wanted.abs().max())
    return "" if distance < TOLERANCE else f"whose outputs its weight misses by {distance:.0%}"
