"""polyquant: every quantization method for Hugging Face language models behind one interface.

Importing this package imports neither torch nor any backend.
"""

from polyquant.api import (
    Diagnosis,
    backend,
    backends,
    compare,
    convert,
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

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Diagnosis",
    "LoadedModel",
    "backend",
    "backends",
    "compare",
    "convert",
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
