"""The autogptq backend: its card and its hooks. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyquant.plugin import (
    BackendInfo,
    Capabilities,
    DeviceSupport,
    Isolated,
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

from polyquant_autogptq.options import AutogptqOptions

AUTO_GPTQ = Library(distribution="auto-gptq", versions="==0.7.1", module="auto_gptq")
LIBRARIES = (AUTO_GPTQ, Library(distribution="transformers", versions=">=4.51,<4.52"))
ISOLATED = Isolated(
    reason="auto-gptq 0.7.1 is archived, and imports nothing newer than transformers 4.51.3",
    requirements=(
        "torch==2.13.0", "transformers==4.51.3", "accelerate==1.6.0", "peft==0.15.2", "datasets==5.0.1",
        "gekko==1.3.3", "sentencepiece==0.2.3",
    ),
    without_dependencies=("auto-gptq==0.7.1",),  # it asks for rouge, which only its evaluation tasks use
)  # fmt: skip
CAPABILITIES = Capabilities(
    bits=(2, 3, 4, 8),
    schemes=("gptq2", "gptq3", "gptq4", "gptq8"),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(6, 0))),
    needs_calibration=True,
    loads_prequantized=("gptq",),
)


class AutogptqBackend:
    """Hook implementations; the work is in `_load.py`, `_quantize.py` and `_layers.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="autogptq",
            summary="auto-gptq 0.7.1, archived: reads GPTQ checkpoints and makes them, in an environment of its own",
            capabilities=CAPABILITIES,
            options=AutogptqOptions,
            docs="https://github.com/AutoGPTQ/AutoGPTQ",
            libraries=LIBRARIES,
            presets={"int4": {"bits": 4, "group_size": 64}, "int8": {"bits": 8, "group_size": 64}},
            compute_dtypes={"cpu": "float32"},
            isolated=ISOLATED,
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems((AUTO_GPTQ,))
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> AutogptqOptions:
        return convert(AutogptqOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: AutogptqOptions) -> LoadedModel:
        from polyquant_autogptq import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_autogptq import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: AutogptqOptions) -> list[LayerPlan]:
        from polyquant_autogptq.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def quantize(self, request: LoadRequest, config: AutogptqOptions, calibration: Sequence[str], out: Path) -> Path:
        from polyquant_autogptq import _quantize

        return _quantize.quantize(request, config, calibration, out)


backend = AutogptqBackend()
