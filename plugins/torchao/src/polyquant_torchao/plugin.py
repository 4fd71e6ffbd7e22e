"""The torchao backend: its card and its hooks. Imports nothing heavy."""

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

from polyquant_torchao.options import TorchAoOptions

TORCHAO = Library(distribution="torchao", versions=">=0.18,<0.19")
LIBRARIES = (
    TORCHAO,
    Library(distribution="transformers", versions=">=5"),  # older ones save torchao's tensors with pickle only
    Library(distribution="accelerate", versions=">=1.6"),
)
CAPABILITIES = Capabilities(
    bits=(8,),
    schemes=("int8", "int8-dynamic", "int4-in-int8", "float8"),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(8, 0))),
    on_the_fly=True,
    loads_prequantized=("torchao",),
    saves=True,
    trains=True,
)


class TorchAoBackend:
    """Hook implementations; the work is in `_load.py` and `_layers.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="torchao",
            summary="int8, int4 and float8 weights as tensor subclasses; int8 activations if asked",
            capabilities=CAPABILITIES,
            options=TorchAoOptions,
            docs="https://docs.pytorch.org/ao",
            libraries=LIBRARIES,
            presets={
                "int8": {"weights": "int8"},
                "int8-dynamic": {"weights": "int8", "dynamic_activations": True},
                "int4": {"weights": "int4"},
                "float8": {"weights": "float8"},
            },
            compute_dtypes={"cpu": "float32"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems((TORCHAO,))
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> TorchAoOptions:
        return convert(TorchAoOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: TorchAoOptions) -> LoadedModel:
        from polyquant_torchao import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_torchao import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: TorchAoOptions) -> list[LayerPlan]:
        from polyquant_torchao.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def save(self, loaded: LoadedModel, out: Path) -> Path:
        from polyquant_torchao import _load

        return _load.save(loaded, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_torchao import _load

        return _load.prepare_for_training(loaded)


backend = TorchAoBackend()
