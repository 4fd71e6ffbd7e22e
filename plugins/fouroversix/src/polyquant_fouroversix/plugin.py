"""The Four Over Six backend: its card and its hooks. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
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

from polyquant_fouroversix.options import FouroversixOptions

FOUROVERSIX = Library(distribution="fouroversix", versions=">=1.0.5,<1.1")
INSTALL = (
    "pip install 'setuptools>=77.0.3' packaging, then: "
    "SKIP_CUDA_BUILD=1 FORCE_BUILD=1 pip install --no-build-isolation '{}' (its setup.py imports torch; "
    "without these variables it needs nvcc, or fetches a wheel with CUDA kernels, which are not used here)"
)
LIBRARIES = (
    FOUROVERSIX,
    Library(distribution="torch", versions=">=2.7"),
    Library(distribution="transformers", versions=">=5.2"),
    Library(distribution="accelerate", versions=">=1.6"),
)
CAPABILITIES = Capabilities(
    bits=(4,),
    schemes=("nvfp4", "mxfp4", "if4", "nvint4"),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
    on_the_fly=True,
    loads_prequantized=("fouroversix",),
    saves=True,
    trains=True,
)


class FouroversixBackend:
    """Hook implementations; the work is in `_load.py`, `_layers.py`, `modules.py` and `numbers.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="fouroversix",
            summary="NVFP4 with adaptive block scaling (4/6), MXFP4, IF4 and NVINT4, packed on any device",
            capabilities=CAPABILITIES,
            options=FouroversixOptions,
            docs="https://github.com/mit-han-lab/fouroversix",
            libraries=LIBRARIES,
            presets={
                "nvfp4": {"dtype": "nvfp4", "scale_rule": "mse"},
                "if4": {"dtype": "if4", "scale_rule": "mse"},
                "mxfp4": {"dtype": "mxfp4", "scale_rule": "static_6"},
            },
            compute_dtypes={"cpu": "float32"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = [
            msgspec.structs.replace(problem, fix=INSTALL.format(FOUROVERSIX.requirement))
            if problem.what.startswith(f"{FOUROVERSIX.distribution} ")
            else problem
            for problem in library_problems(LIBRARIES)
        ]
        broken = [] if problems else import_problems(LIBRARIES)
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> FouroversixOptions:
        return convert(FouroversixOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: FouroversixOptions) -> LoadedModel:
        from polyquant_fouroversix import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_fouroversix import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: FouroversixOptions) -> list[LayerPlan]:
        from polyquant_fouroversix.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def save(self, loaded: LoadedModel, out: Path) -> Path:
        from polyquant_fouroversix import _load

        return _load.save(loaded, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_fouroversix import _load

        return _load.prepare_for_training(loaded)


backend = FouroversixBackend()
