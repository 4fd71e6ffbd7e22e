"""polyquant: every quantization method for Hugging Face language models behind one interface.

Importing this package imports nothing else; each name is imported when it is first used, neither torch nor any backend
with it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Diagnosis",
    "LoadedModel",
    "backend",
    "backends",
    "compare",
    "convert",
    "difference",
    "doctor",
    "finetune",
    "hookimpl",
    "load",
    "merge",
    "observing",
    "plan",
    "quantize",
    "read_comparison",
    "recommend",
    "search",
    "verify",
]

if TYPE_CHECKING:
    from polyquant.api import (
        Diagnosis,
        backend,
        backends,
        compare,
        convert,
        difference,
        doctor,
        finetune,
        load,
        merge,
        observing,
        plan,
        quantize,
        read_comparison,
        recommend,
        search,
        verify,
    )
    from polyquant.contract.markers import hookimpl
    from polyquant.loaded import LoadedModel
    from polyquant.registry.backend import Backend
else:
    _HOMES = {
        **dict.fromkeys(("backend", "backends"), "isolated.handles"),
        "hookimpl": "contract.markers",
        "LoadedModel": "loaded",
        "Backend": "registry.backend",
    }
    """Where public names are that are used without the others; the rest are in `api`."""

    def __getattr__(name: str) -> object:
        """A public name, or a module of this package."""
        if name in __all__:
            value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)
        else:
            value = _module(name)
        globals()[name] = value
        return value

    def _module(name: str) -> object:
        wanted = f"{__name__}.{name}"
        try:
            if not name.startswith("_"):
                return import_module(wanted)
        except ModuleNotFoundError as error:
            if error.name != wanted:
                raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
