"""What a run asks for that this device cannot give: refused before the first step."""

from __future__ import annotations

from importlib.util import find_spec

from polyquant.errors import ConfigError, EnvironmentProblem
from polyquant.finetuning.options import TrainingOptions


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
