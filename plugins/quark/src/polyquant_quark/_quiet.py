"""amd-quark without its talk, and without what it leaves behind in the process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._dynamo
from polyquant.plugin import checkpoints, quiet_imports
from tqdm import tqdm

LIMITS = ("recompile_limit", "accumulated_recompile_limit")  # raised at its import, for the whole process


@contextmanager
def quiet_quark(*, progress: bool) -> Iterator[None]:
    """In the block Quark logs no information, and draws its bars only where `progress`; nothing is compiled by torch.

    Random state, environment, warning filters and dynamo's limits are afterwards what they were before.
    """
    environment, draw = dict(os.environ), tqdm.__init__
    limits = {name: getattr(torch._dynamo.config, name) for name in LIMITS}
    if not progress:
        tqdm.__init__ = lambda self, *args, **kwargs: draw(self, *args, **{**kwargs, "disable": True})
    try:
        with (
            torch.random.fork_rng(), warnings.catch_warnings(), quiet_imports(), checkpoints.progress_bars(progress),
            torch.compiler.set_stance("force_eager"),
        ):  # fmt: skip
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = draw
        for name, value in limits.items():
            setattr(torch._dynamo.config, name, value)
        for name in set(os.environ) - set(environment):
            os.environ.pop(name)
        os.environ.update(environment)
