"""The AWQ backend: its card and its hooks. Imports nothing heavy."""

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

from polyquant_awq.options import AwqOptions

GPTQMODEL = Library(
    distribution="gptqmodel", versions=">=7.7,<8",
    caution="it asks for torch 2.14.1 or newer, and with --no-deps runs on 2.13",
)  # fmt: skip
LIBRARIES = (
    GPTQMODEL,
    Library(distribution="torch", versions=">=2.13"),  # gptqmodel's metadata asks for 2.14.1; 2.13 is tested
    Library(distribution="transformers", versions=">=5.20"),  # gptqmodel asks for it
    Library(distribution="accelerate", versions=">=1.6"),
)
CAPABILITIES = Capabilities(
    bits=(4,),
    schemes=("awq4",),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 5))),
    needs_calibration=True,
    loads_prequantized=("awq",),
    trains=True,
)


class AwqBackend:
    """Hook implementations; the work is in `_load.py`, `_quantize.py` and `_layers.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="awq",
            summary="calibrated 4-bit weights; reads the AWQ checkpoints of autoawq and gptqmodel",
            capabilities=CAPABILITIES,
            options=AwqOptions,
            docs="https://github.com/ModelCloud/GPTQModel",
            libraries=LIBRARIES,
            presets={"int4": {"group_size": 64}},
            compute_dtypes={"cpu": "bfloat16"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems((GPTQMODEL,))
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> AwqOptions:
        return convert(AwqOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: AwqOptions) -> LoadedModel:
        from polyquant_awq import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_awq import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: AwqOptions) -> list[LayerPlan]:
        from polyquant_awq.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def quantize(self, request: LoadRequest, config: AwqOptions, calibration: Sequence[str], out: Path) -> Path:
        from polyquant_awq import _quantize

        return _quantize.quantize(request, config, calibration, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_awq import _layers

        return _layers.prepare_for_training(loaded)


backend = AwqBackend()
