"""The Quark backend: its card and its hooks. Imports nothing heavy."""

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
    library_problems,
)

from polyquant_quark.options import QuarkOptions

LIBRARIES = (Library(distribution="accelerate", versions=">=1.6"),)  # amd-quark is needed to quantize only
CAPABILITIES = Capabilities(
    bits=(4, 8),
    schemes=("int4", "uint4", "int8", "fp8", "mxfp4"),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
    loads_prequantized=("quark",),
    saves=True,
    trains=True,
)


class QuarkBackend:
    """Hook implementations; the work is in `_load.py`, `_layers.py` and `_quantize.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="quark",
            summary="checkpoints of AMD Quark: int4, uint4, int8, fp8 and mxfp4 weights, kept packed",
            capabilities=CAPABILITIES,
            options=QuarkOptions,
            docs="https://quark.docs.amd.com",
            libraries=LIBRARIES,
            presets={
                "int4": {"weights": "int4", "group_size": 64},
                "int8": {"weights": "int8"},
                "fp8": {"weights": "fp8"},
                "mxfp4": {"weights": "mxfp4"},
            },
            compute_dtypes={"cpu": "float32"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        return library_problems(LIBRARIES) + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> QuarkOptions:
        return convert(QuarkOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: QuarkOptions) -> LoadedModel:
        from polyquant_quark import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_quark import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: QuarkOptions) -> list[LayerPlan]:
        from polyquant_quark.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def quantize(self, request: LoadRequest, config: QuarkOptions, calibration: Sequence[str], out: Path) -> Path:
        from polyquant_quark.quantizing import quantize

        return quantize(request, config, calibration, out)

    @hookimpl
    def save(self, loaded: LoadedModel, out: Path) -> Path:
        from polyquant_quark import _load

        return _load.save(loaded, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_quark import _load

        return _load.prepare_for_training(loaded)


backend = QuarkBackend()
