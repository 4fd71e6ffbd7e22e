"""The llama.cpp backend: its card and its hooks. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyquant.plugin import (
    BackendInfo,
    Capabilities,
    DeviceSupport,
    LayerInfo,
    Library,
    LoadedModel,
    LoadRequest,
    Problem,
    convert,
    device_problems,
    hookimpl,
    import_problems,
    library_problems,
)
from polyquant.plugin.gguf import TYPES

from polyquant_llama_cpp.options import LlamaCppOptions

LIBRARIES = (Library(distribution="llama-cpp-python", versions=">=0.3.36,<0.4", module="llama_cpp"),)
PACKED = [block for block in TYPES.values() if block.packed]
CAPABILITIES = Capabilities(
    bits=tuple(sorted({block.bits for block in PACKED})),
    schemes=tuple(block.name for block in PACKED),
    devices=(DeviceSupport(type="cpu"),),
    loads_prequantized=("gguf",),
    runtime="llama.cpp",
    makes_from="gguf",
)


class LlamaCppBackend:
    """Hook implementations; the work is in `_load.py`, `_layers.py` and `quantizing.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="llama-cpp",
            summary="GGUF files on llama.cpp's own runtime: the fastest on a CPU; quantizes GGUFs to its block types",
            capabilities=CAPABILITIES,
            options=LlamaCppOptions,
            docs="https://llama-cpp-python.readthedocs.io",
            libraries=LIBRARIES,
            presets={name: {"type": name} for name in ("Q4_K_M", "Q4_0", "Q8_0")},
            compute_dtypes={"cpu": "float32"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems(LIBRARIES)
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> LlamaCppOptions:
        return convert(LlamaCppOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: LlamaCppOptions) -> LoadedModel:
        from polyquant_llama_cpp import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_llama_cpp import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def quantize(self, request: LoadRequest, config: LlamaCppOptions, calibration: Sequence[str], out: Path) -> Path:
        from polyquant_llama_cpp import quantizing

        return quantizing.quantize(request, config, calibration, out)


backend = LlamaCppBackend()
