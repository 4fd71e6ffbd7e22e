"""The AQLM backend: its card and its hooks. Imports nothing heavy."""

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

from polyquant_aqlm.options import AqlmOptions

LIBRARIES = (
    Library(distribution="aqlm", versions=">=1.1.6,<1.2"),
    Library(distribution="numba", versions=">=0.59"),
)
CAPABILITIES = Capabilities(
    bits=(1, 2, 3, 4, 5, 6, 7, 8),
    schemes=("aqlm",),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
    loads_prequantized=("aqlm",),
    saves=True,
    trains=True,
)


class AqlmBackend:
    """Hook implementations; the work is in `_load.py`, `_layers.py` and `kernels.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="aqlm",
            summary="reads AQLM checkpoints: groups of weights as sums of codebook vectors, good at 2 bit",
            capabilities=CAPABILITIES,
            options=AqlmOptions,
            docs="https://github.com/Vahe1994/AQLM",
            libraries=LIBRARIES,
            presets={
                "2x8": {"num_codebooks": 2, "nbits_per_codebook": 8},
                "4x8": {"num_codebooks": 4, "nbits_per_codebook": 8},
            },
            compute_dtypes={"cpu": "float32"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems(LIBRARIES)
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> AqlmOptions:
        return convert(AqlmOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: AqlmOptions) -> LoadedModel:
        from polyquant_aqlm import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_aqlm import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: AqlmOptions) -> list[LayerPlan]:
        from polyquant_aqlm.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def save(self, loaded: LoadedModel, out: Path) -> Path:
        from polyquant_aqlm import _load

        return _load.save(loaded, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_aqlm import _load

        return _load.prepare_for_training(loaded)


backend = AqlmBackend()
