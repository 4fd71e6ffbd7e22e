"""Whether a load can have the key-value cache it is asked for: settled before any weight is read."""

from __future__ import annotations

from polyquant.errors import ConfigError
from polyquant.models.model import Model
from polyquant.options import describe_options
from polyquant.registry.installed import registry
from polyquant.request import KvCache


def require_cache(kv_cache: KvCache, model: Model, backend: str) -> None:
    """Raises ConfigError where the backend runs models outside torch, or `model` cannot keep codes."""
    if kv_cache != "keep":
        require_torch(kv_cache, backend)
        model.require_kv_cache(kv_cache)


def require_kept(kv_cache: KvCache, verb: str) -> None:
    """Raises ConfigError where what is written would have to say how whoever loads it keeps keys and values."""
    if kv_cache != "keep":
        raise ConfigError(
            f"no checkpoint stores kv_cache={kv_cache!r}: leave it out where you {verb}, and give it to whoever loads "
            "the model to run it"
        )


def require_torch(kv_cache: KvCache, backend: str) -> None:
    """Raises ConfigError, with the backend's own option for it, where that runs models outside torch, here or not."""
    info = registry().info(backend)
    if info.capabilities.runs_on_torch:
        return
    own = next((option for option in describe_options(info.options) if "kv_cache" in option.name), None)
    instead = f"take its own option {own.name}: {', '.join(map(str, own.values))}" if own else "leave it out"
    raise ConfigError(f"kv_cache={kv_cache!r} is for models in torch, and {backend} has its own runtime; {instead}")
