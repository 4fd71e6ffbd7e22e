"""Imports PEFT and what it imports in turn, without a word of theirs."""

from __future__ import annotations

from functools import cache
from typing import Any

from polyquant.support.libraries import contained


@cache
def import_peft() -> Any:
    """The module `peft`.

    Only when it wraps a layer does PEFT import the libraries that it knows layers of, and some of those print what they
    are, into the middle of `--json`. So one layer is wrapped here, and thrown away. Imports torch.
    """
    with contained():
        import peft
        import torch

        with torch.random.fork_rng(devices=[]):
            adapters = peft.LoraConfig(r=1, target_modules=["0"])
            peft.inject_adapter_in_model(adapters, torch.nn.Sequential(torch.nn.Linear(1, 1)))
    return peft
