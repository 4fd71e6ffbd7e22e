"""The GGUF backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend
from polyquant.plugin.gguf import TYPES

from polyquant_gguf.options import GgufOptions

GGUF = Library(distribution="gguf", versions=">=0.17,<0.20")
INFO = BackendInfo(
    name="gguf",
    summary="GGUF files in plain torch, weights kept packed; quantizes dense models to the same types",
    capabilities=Capabilities(
        bits=tuple(sorted({block.bits for block in TYPES.values() if block.packed})),
        schemes=tuple(name for name, block in TYPES.items() if block.packed),
        devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda")),
        on_the_fly=True,
        loads_prequantized=("gguf",),
        saves=True,
        readable_by=("llama.cpp",),
    ),
    options=GgufOptions,
    docs="https://github.com/ggml-org/ggml/blob/master/docs/gguf.md",
    libraries=(GGUF, Library(distribution="accelerate", versions=">=1.6")),
    presets={name: {"type": name} for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    measured_kl={"Q4_0": 0.299, "Q5_0": 0.0682, "Q5_1": 0.121, "Q8_0": 0.00111},
    compute_dtypes={"cpu": "float32"},
)
backend = PluginBackend(INFO, ("plan_layers", "save", "pack", "unpack", "write_unpacked"), imports=(GGUF,))
