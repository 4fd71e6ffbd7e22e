"""What a load must leave alone: state of the whole process, as text that can be compared."""

from __future__ import annotations

import hashlib
import locale
import logging
import os
import random
import warnings
from pathlib import Path
from typing import Any


def snapshot() -> dict[str, str]:
    """The process's global state by name. Imports torch and numpy."""
    import numpy as np
    import torch

    state: dict[str, Any] = {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's random state": _digest(torch.get_rng_state().numpy().tobytes()),
        "numpy's random state": _digest(repr(np.random.get_state()).encode()),  # noqa: NPY002  the one that is global
        "random's state": _digest(repr(random.getstate()).encode()),
        "the number of threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "TF32 in matmul": torch.backends.cuda.matmul.allow_tf32,
        "TF32 in cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "the working directory": Path.cwd(),
        "the locale": locale.setlocale(locale.LC_ALL),
        "logging.disable": logging.root.manager.disable,
        "the root logger's level": logging.root.level,
        "the warning filters": len(warnings.filters),
    }
    environment = {f"os.environ[{name!r}]": value for name, value in os.environ.items()}
    return {name: str(value) for name, value in {**state, **environment}.items()}


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What is not the same, in words."""
    return [
        f"{name}: {before.get(name, 'not set')} before, {after.get(name, 'not set')} after"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
