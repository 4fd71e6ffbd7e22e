"""How to load, whatever the backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from polyquant.options import convert
from polyquant.request import KvCache, MaxMemory, Offload


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of `polyquant.load` that are no backend's."""

    device: str = "auto"
    device_map: Any = "auto"
    max_memory: MaxMemory | None = None
    offload: Offload = "error"
    allow_dequantize: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    attention: str = ""
    kv_cache: KvCache = "keep"
    emulate_activations: bool = False
    adapter: tuple[str, ...] = ()
    return_freed_memory: bool = False
    cache: bool = True
    progress: bool = False


def split_options(options: Mapping[str, Any]) -> tuple[LoadOptions, dict[str, Any]]:
    """How to load, and the backend's own options. Raises ConfigError for a load option of the wrong type."""
    shared = {name: options[name] for name in LoadOptions.__struct_fields__ if name in options}
    if isinstance(adapter := shared.get("adapter", ()), (str, Path)):
        adapter = (adapter,) if str(adapter) else ()
    shared["adapter"] = tuple(map(str, adapter))
    own = {name: value for name, value in options.items() if name not in shared}
    return convert(LoadOptions, shared), own
