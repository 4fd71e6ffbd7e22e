"""The FP8 backend: its card and its hooks. Imports nothing heavy."""

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

from polyquant_fp8.options import Fp8Options

LIBRARIES = (
    Library(distribution="torch", versions=">=2.7"),
    Library(distribution="transformers", versions=">=4.52"),
    Library(distribution="accelerate", versions=">=1.6"),
)
CAPABILITIES = Capabilities(
    bits=(8,),
    schemes=("fp8-e4m3",),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
    on_the_fly=True,
    loads_prequantized=("fp8",),
    saves=True,
    trains=True,
)


class Fp8Backend:
    """Hook implementations; the work is in `_load.py`, `_layers.py` and `modules.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="fp8",
            summary="fine-grained FP8: e4m3 weights in scaled blocks, packed on any device",
            capabilities=CAPABILITIES,
            options=Fp8Options,
            docs="https://huggingface.co/docs/transformers/quantization/finegrained_fp8",
            libraries=LIBRARIES,
            presets={
                "block128": {"block_rows": 128, "block_columns": 128},
                "ue8m0": {"block_rows": 128, "block_columns": 128, "scale_fmt": "ue8m0"},
                "tensor": {"block_rows": 0, "block_columns": 0},
            },
            compute_dtypes={"cpu": "float32"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems(LIBRARIES)
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> Fp8Options:
        return convert(Fp8Options, options)

    @hookimpl
    def load(self, request: LoadRequest, config: Fp8Options) -> LoadedModel:
        from polyquant_fp8 import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_fp8 import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: Fp8Options) -> list[LayerPlan]:
        from polyquant_fp8.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def save(self, loaded: LoadedModel, out: Path) -> Path:
        from polyquant_fp8 import _load

        return _load.save(loaded, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_fp8 import _load

        return _load.prepare_for_training(loaded)


backend = Fp8Backend()
