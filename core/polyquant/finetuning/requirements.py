"""What a run asks for that this device, or this backend's layers, cannot give: refused before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from polyquant.errors import ConfigError, EnvironmentProblem, UnsupportedOperation
from polyquant.finetuning.options import TrainingOptions

TOLERANCE = 0.05  # of the largest output: kernels round, other weights are further off than that


def require_optimizer(options: TrainingOptions, device: str) -> None:
    """Raises EnvironmentProblem where its library is missing, ConfigError where it cannot do its work on `device`.

    bitsandbytes' paged optimizers move their state between a GPU and the CPU; on a CPU it warns, and does not page.
    """
    if "bit" in options.optimizer and find_spec("bitsandbytes") is None:
        raise EnvironmentProblem(
            f"the optimizer {options.optimizer} is bitsandbytes', which is not installed: pip install bitsandbytes, "
            "or leave the optimizer at adamw_torch"
        )
    if options.optimizer.startswith("paged") and device == "cpu":
        plain = "adamw_8bit" if "8bit" in options.optimizer else "adamw_torch"
        raise ConfigError(
            f"{options.optimizer} pages its state between GPU and CPU, and the model is on the cpu; "
            f"use optimizer={plain!r} (--optimizer {plain})"
        )


def require_dora(model: Any, targets: Sequence[str], backend: str) -> None:
    """Raises UnsupportedOperation where PEFT does not find the true weights of the modules `targets`.

    DoRA needs their norms. PEFT dequantizes what it knows, and takes any other `weight` for the dense one, in silence;
    so one layer of each kind is asked what it answers, which must be what PEFT's weight gives.
    """
    kinds = {type(model.get_submodule(name)): name for name in reversed(targets)}
    for kind, name in kinds.items():
        wrong = _misread(model.get_submodule(name))
        if wrong:
            raise UnsupportedOperation(
                f"DoRA needs weights that PEFT can read, and those of {backend} are not: {name} ({kind.__name__}), "
                f"{wrong}. Leave it out (dora=False); rslora=True works on every backend"
            )


def _misread(layer: Any) -> str:
    """What is wrong with the weight that PEFT reads from `layer`; empty where it is the true one."""
    import torch
    from peft.utils.integrations import dequantize_module_weight

    try:
        weight = dequantize_module_weight(layer).detach()
    except Exception as error:  # of the backend's library, or PEFT's
        return f"{type(error).__name__}: {error}"
    if tuple(weight.shape) != (layer.out_features, layer.in_features) or not weight.is_floating_point():
        return f"where it finds {tuple(weight.shape)} {weight.dtype}"
    dtype = next((tensor.dtype for tensor in layer.parameters() if tensor.is_floating_point()), weight.dtype)
    inputs = torch.linspace(-1, 1, layer.in_features, dtype=dtype, device=weight.device)[None]
    with torch.no_grad():
        given = (layer(inputs) - layer(torch.zeros_like(inputs))).float()
        wanted = torch.nn.functional.linear(inputs.float(), weight.float())
    distance = float((given - wanted).abs().max() / wanted.abs().max())
    return "" if distance < TOLERANCE else f"whose outputs its weight misses by {distance:.0%}"
