"""The rowwise backend: its card and its hooks. Imports nothing heavy."""

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
    LoadedModel,
    LoadRequest,
    Problem,
    WeightInfo,
    convert,
    device_problems,
    hookimpl,
)

from polyquant_rowwise.options import QUANT_METHOD, RowwiseOptions
from polyquant_rowwise.planning import SCHEME

# Replace: what your backend can do. Each entry is a promise that `polyquant check-backend rowwise` puts to the test.
CAPABILITIES = Capabilities(
    bits=(8,),
    schemes=(SCHEME,),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda")),
    on_the_fly=True,
    loads_prequantized=(QUANT_METHOD,),
    saves=True,
    trains=True,
)


class RowwiseBackend:
    """Hook implementations; the work is in `_load.py` and `_layers.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="rowwise",
            # Replace: summary, docs, presets (the first is the default), the dtype that is best on each device, and
            # libraries=(Library(distribution="acme", versions=">=2.1,<3"),) for what you stand on.
            summary="8 bit with one scale for each output row, in plain torch",
            capabilities=CAPABILITIES,
            options=RowwiseOptions,
            docs="https://example.org/polyquant-rowwise",
            presets={"int8": {"bits": 8}, "int8-bf16-scales": {"bits": 8, "scale_dtype": "bfloat16"}},
            compute_dtypes={"cpu": "float32"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        # Replace: where you have libraries, library_problems and import_problems of polyquant.support.libraries come first.
        return device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> RowwiseOptions:
        return convert(RowwiseOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: RowwiseOptions) -> LoadedModel:
        from polyquant_rowwise import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_rowwise import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: RowwiseOptions) -> list[LayerPlan]:
        from polyquant_rowwise import planning

        return planning.plan_layers(weights, config)

    @hookimpl
    def save(self, loaded: LoadedModel, out: Path) -> Path:
        from polyquant_rowwise import _load

        return _load.save(loaded, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_rowwise import _load

        return _load.prepare_for_training(loaded)


backend = RowwiseBackend()
