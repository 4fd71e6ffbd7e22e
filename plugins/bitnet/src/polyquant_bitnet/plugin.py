"""The BitNet backend: its card and its hooks. Imports nothing heavy."""

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

from polyquant_bitnet.options import BitnetOptions

LIBRARIES = (
    Library(distribution="transformers", versions=">=4.52"),
    Library(distribution="accelerate", versions=">=1.6"),
)
CAPABILITIES = Capabilities(
    bits=(2,),
    schemes=("ternary-a8",),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
    loads_prequantized=("bitnet",),
    saves=True,
    trains=True,
)


class BitnetBackend:
    """Hook implementations; the work is in `_load.py`, `_layers.py` and `modules.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="bitnet",
            summary="reads BitNet b1.58 checkpoints: weights -1, 0 and 1 in two bits, activations in int8",
            capabilities=CAPABILITIES,
            options=BitnetOptions,
            docs="https://github.com/microsoft/BitNet",
            libraries=LIBRARIES,
            presets={
                "bitlinear": {"linear_class": "bitlinear"},
                "autobitlinear": {"linear_class": "autobitlinear"},
            },
            compute_dtypes={"cpu": "float32"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems(LIBRARIES)
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> BitnetOptions:
        return convert(BitnetOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: BitnetOptions) -> LoadedModel:
        from polyquant_bitnet import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_bitnet import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: BitnetOptions) -> list[LayerPlan]:
        from polyquant_bitnet.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def save(self, loaded: LoadedModel, out: Path) -> Path:
        from polyquant_bitnet import _load

        return _load.save(loaded, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_bitnet import _load

        return _load.prepare_for_training(loaded)


backend = BitnetBackend()
