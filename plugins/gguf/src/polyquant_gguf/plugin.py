"""The GGUF backend: its card and its hooks. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyquant.plugin import (
    BackendInfo,
    Capabilities,
    DeviceSupport,
    LayerInfo,
    LayerPlan,
    Library,
    LoadedModel,
    LoadRequest,
    Problem,
    WeightInfo,
    convert,
    device_problems,
    hookimpl,
    import_problems,
    library_problems,
)
from polyquant.plugin.gguf import TYPES

from polyquant_gguf.options import GgufOptions

GGUF = Library(distribution="gguf", versions=">=0.17,<0.20")
LIBRARIES = (GGUF, Library(distribution="accelerate", versions=">=1.6"))
CAPABILITIES = Capabilities(
    bits=tuple(sorted({block.bits for block in TYPES.values() if block.packed})),
    schemes=tuple(name for name, block in TYPES.items() if block.packed),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda")),
    on_the_fly=True,
    loads_prequantized=("gguf",),
    saves=True,
)


class GgufBackend:
    """Hook implementations; the work is in `_load.py`, `_layers.py` and `writing.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="gguf",
            summary="GGUF files in plain torch, weights kept packed; quantizes dense models to the same types",
            capabilities=CAPABILITIES,
            options=GgufOptions,
            docs="https://github.com/ggml-org/ggml/blob/master/docs/gguf.md",
            libraries=LIBRARIES,
            presets={name: {"type": name} for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
            compute_dtypes={"cpu": "float32"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems((GGUF,))
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> GgufOptions:
        return convert(GgufOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: GgufOptions) -> LoadedModel:
        from polyquant_gguf import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_gguf import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: GgufOptions) -> list[LayerPlan]:
        from polyquant_gguf.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def save(self, loaded: LoadedModel, out: Path) -> Path:
        from polyquant_gguf import writing

        return writing.save(loaded, out)


backend = GgufBackend()
