"""The GPTQ backend: its card and its hooks. Imports nothing heavy."""

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

from polyquant_gptq.options import GptqOptions

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
    bits=(2, 3, 4, 8),
    schemes=("gptq2", "gptq3", "gptq4", "gptq8"),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 5))),
    needs_calibration=True,
    loads_prequantized=("gptq",),
    trains=True,
)


class GptqBackend:
    """Hook implementations; the work is in `_load.py`, `_quantize.py` and `_layers.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="gptq",
            summary="calibrated 2 to 8 bit weights; reads the GPTQ checkpoints of gptqmodel and auto-gptq",
            capabilities=CAPABILITIES,
            options=GptqOptions,
            docs="https://github.com/ModelCloud/GPTQModel",
            libraries=LIBRARIES,
            presets={
                "int4": {"bits": 4, "group_size": 64},
                "int8": {"bits": 8, "group_size": 64},
                "int4-act-order": {"bits": 4, "group_size": 64, "desc_act": True},
            },
            compute_dtypes={"cpu": "bfloat16"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems((GPTQMODEL,))
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> GptqOptions:
        return convert(GptqOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: GptqOptions) -> LoadedModel:
        from polyquant_gptq import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_gptq import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: GptqOptions) -> list[LayerPlan]:
        from polyquant_gptq.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def quantize(self, request: LoadRequest, config: GptqOptions, calibration: Sequence[str], out: Path) -> Path:
        from polyquant_gptq import _quantize

        return _quantize.quantize(request, config, calibration, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_gptq import _layers

        return _layers.prepare_for_training(loaded)


backend = GptqBackend()
