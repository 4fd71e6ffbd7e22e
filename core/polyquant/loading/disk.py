"""`offload="disk"`: which blocks of a packed model are read from their file for each token, and whether they can be.

Settled before anything is read of the model. The file is the entry of the cache of quantized weights
(`quantized_cache`), which is made layer by layer, so that the model is never in memory as a whole.
"""

from __future__ import annotations

import shutil

import psutil

from polyquant.errors import ConfigError, PlacementError
from polyquant.loading.entries import SIZE, most_bytes
from polyquant.loading.options import LoadOptions
from polyquant.loading.settle import Settled, as_stored
from polyquant.memory.on_disk import SHARE, Split, experts_per_token, split
from polyquant.models.model import Model
from polyquant.packable import is_packed
from polyquant.registry.backend import Backend
from polyquant.request import MaxMemory
from polyquant.support.cache import cache_folder
from polyquant.support.sizes import parse_size, size
from polyquant.types import LayerPlan


def blocks_on_disk(model: Model, backend: Backend, settled: Settled, how: LoadOptions) -> Split | None:
    """What of a load is read from the disk for each token; None where that is not asked for.

    Raises ConfigError where the options are not for that, PlacementError where what stays does not fit either.
    """
    if how.offload != "disk":
        return None
    if how.max_memory is not None and list(how.max_memory) != ["cpu"]:
        raise ConfigError(
            f"with offload='disk', max_memory is of the cpu alone, got {', '.join(map(str, how.max_memory))}"
        )
    planned = plans_for_disk(model, backend, settled)
    room = room_for_weights(how.max_memory)
    found = split(planned, room, experts_per_token(model.source.config))
    if found.on_disk:
        _require_cache(how)
    if found.resident_bytes > room:
        raise PlacementError(
            f"{model.name} takes {size(found.resident_bytes)} of memory even with offload='disk': embedding, head, "
            f"what is dense, and two of its blocks; there is room for {size(room)}: choose fewer bits, "
            "embeddings='8bit', or raise max_memory (--max-memory)"
        )
    return found


def plans_for_disk(model: Model, backend: Backend, settled: Settled) -> list[LayerPlan]:
    """What a model's tensors are going to be. Raises ConfigError where they cannot be read from the disk in parts."""
    if not backend.capabilities.runs_on_torch:
        raise ConfigError(
            f"{backend.name} runs outside torch, or in another environment, and offload='disk' is for models in torch, "
            "in this one: leave it out"
        )
    if not is_packed(settled.options):
        kernel = "kernel='packed' (--kernel packed)" if hasattr(settled.options, "kernel") else "another backend"
        raise ConfigError(f"offload='disk' reads layers in the packed layout: take {kernel}, or leave offload out")
    with as_stored(settled, model.name, backend.name):
        planned = backend.plan_layers(settled.weights, settled.options)
    if left := [plan.name for plan in planned if plan.quantized and plan.packed is None]:
        raise ConfigError(
            f"offload='disk' reads layers in the packed layout, and {len(left)} of {backend.name} have no place there, "
            f"such as {left[0]}: take other options, or leave offload out"
        )
    return planned


def room_for_weights(max_memory: MaxMemory | None) -> int:
    """Bytes of this machine's memory that weights may take: as the user says, or a part of what is free."""
    if max_memory is None:
        return int(SHARE * psutil.virtual_memory().available)
    return parse_size(max_memory["cpu"])


def _require_cache(how: LoadOptions) -> None:
    """Raises ConfigError where the cache, from which blocks are read, is left out."""
    without = {
        "cache=False": not how.cache, "trust_remote_code": how.trust_remote_code,
        "emulate_activations": how.emulate_activations,
    }  # fmt: skip
    if named := [name for name, is_so in without.items() if is_so]:
        raise ConfigError(
            f"offload='disk' reads blocks from the cache of quantized weights, and nothing is kept there with "
            f"{', '.join(named)}: leave one of them out"
        )


def require_space(nbytes: int) -> None:
    """Raises PlacementError where an entry of so many bytes, which is not there yet, has no place in the cache."""
    if nbytes > (limit := most_bytes()):
        raise PlacementError(
            f"offload='disk' keeps {size(nbytes)} in the cache of quantized weights, and {SIZE} is {size(limit)}: set "
            "it higher"
        )
    folder = cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if (free := shutil.disk_usage(there).free) < nbytes:
        raise PlacementError(
            f"offload='disk' keeps {size(nbytes)} in {folder}, and {size(free)} are free there: make room, or set "
            "POLYQUANT_CACHE to a folder on another disk"
        )
