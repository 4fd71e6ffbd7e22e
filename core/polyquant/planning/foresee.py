"""How fast a plan's model is going to be here, before anything of it is there: measured on a stand-in, and kept.

What is kept is by machine, versions, threads, the model's config and the layout of each tensor: a second plan of the
same says the same at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from polyquant.errors import PolyquantError, SaveError
from polyquant.planning.records import Foreseen
from polyquant.support.cache import cache_folder
from polyquant.support.files import write_atomically
from polyquant.support.machine import this_machine
from polyquant.types import UNREADABLE, LayerPlan

FOLDER = "foreseen"
KERNELS = ("polyquant-kernels",)


def foresee(
    config: Any, tensors: Sequence[LayerPlan], device: str, *, packed: bool, trust_remote_code: bool
) -> Foreseen:
    """The speed of a model on the packed runtime of a CPU. config: transformers'; packed: whether that is chosen."""
    if device != "cpu":
        return Foreseen(why=f"speed is foreseen on CPUs, and this is {device}")
    if not packed or any(each.quantized and each.packed is None for each in tensors):
        return Foreseen(why="the backend's own kernels multiply, whose speed shows when they are measured")
    path = cache_folder() / FOLDER / f"{_key(config, tensors)}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Foreseen)
    except (OSError, *UNREADABLE):
        found = _measured(config, tensors, trust_remote_code=trust_remote_code)
    if not found.why:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, msgspec.json.encode(found).decode())
        except (OSError, SaveError):  # it is measured again next time
            pass
    return found


def _measured(config: Any, tensors: Sequence[LayerPlan], *, trust_remote_code: bool) -> Foreseen:
    from polyquant.planning.stand_in import PROMPT_TOKENS, StandIn

    try:
        made = StandIn(config, {each.name: each for each in tensors}, trust_remote_code=trust_remote_code)
        token, prompt = made.token_seconds(), made.prompt_seconds()
    except PolyquantError as error:
        return Foreseen(why=f"no stand-in runs: {error}")
    return Foreseen(generated_tokens_per_second=1 / token, prompt_tokens_per_second=PROMPT_TOKENS / prompt)


def _key(config: Any, tensors: Sequence[LayerPlan]) -> str:
    import torch

    layouts = sorted({(each.role, each.shape, each.packed, each.scheme) for each in tensors}, key=repr)
    known = [config.to_json_string(), repr(layouts), this_machine(KERNELS), torch.get_num_threads()]
    return hashlib.sha256(msgspec.json.encode(known)).hexdigest()[:24]
