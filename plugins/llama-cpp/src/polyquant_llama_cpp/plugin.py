"""The llama.cpp backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend
from polyquant.plugin.gguf import TYPES

from polyquant_llama_cpp.options import LlamaCppOptions

LIBRARIES = (Library(distribution="llama-cpp-python", versions=">=0.3.36,<0.4", module="llama_cpp"),)
PACKED = [block for block in TYPES.values() if block.packed]
INFO = BackendInfo(
    name="llama-cpp",
    summary="GGUF files on llama.cpp's own runtime: the fastest on a CPU; quantizes GGUFs to its block types",
    capabilities=Capabilities(
        bits=tuple(sorted({block.bits for block in PACKED})),
        schemes=tuple(block.name for block in PACKED),
        devices=(DeviceSupport(type="cpu"),),
        loads_prequantized=("gguf",),
        runtime="llama.cpp",
        makes_from="gguf",
    ),
    options=LlamaCppOptions,
    docs="https://llama-cpp-python.readthedocs.io",
    also_called=("llama.cpp", "llama_cpp"),
    libraries=LIBRARIES,
    presets={name: {"type": name} for name in ("Q4_K_M", "Q4_0", "Q8_0")},
    measured_kl={"Q4_K_M": 0.0517, "Q4_0": 0.301, "Q8_0": 0.00382},
    compute_dtypes={"cpu": "float32"},
)
backend = PluginBackend(INFO, ("quantize",), imports=LIBRARIES)
