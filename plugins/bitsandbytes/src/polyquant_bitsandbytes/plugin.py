"""The bitsandbytes backend: its card and its hooks. Imports nothing heavy."""

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

from polyquant_bitsandbytes.options import BitsAndBytesOptions

BITSANDBYTES = Library(distribution="bitsandbytes", versions=">=0.48,<0.51")
TRANSFORMERS = Library(distribution="transformers", versions=">=4.53")  # before, it asks for Intel's extension on CPUs
LIBRARIES = (BITSANDBYTES, Library(distribution="accelerate", versions=">=1.6"), TRANSFORMERS)
CAPABILITIES = Capabilities(
    bits=(4, 8),
    schemes=("nf4", "fp4", "int8"),
    devices=(
        DeviceSupport(type="cpu"),
        DeviceSupport(type="cuda", minimum_capability=(6, 0)),
        DeviceSupport(type="xpu"),
    ),
    on_the_fly=True,
    loads_prequantized=("bitsandbytes",),
    saves=True,
    trains=True,
    offloads=True,
)


class BitsAndBytesBackend:
    """Hook implementations; the work is in `_load.py` and `_layers.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="bitsandbytes",
            summary="NF4, FP4 and LLM.int8 while loading; the base of QLoRA",
            capabilities=CAPABILITIES,
            options=BitsAndBytesOptions,
            docs="https://huggingface.co/docs/bitsandbytes",
            libraries=LIBRARIES,
            presets={
                "nf4": {"bits": 4, "quant_type": "nf4"},
                "nf4-dq": {"bits": 4, "quant_type": "nf4", "double_quant": True},
                "fp4": {"bits": 4, "quant_type": "fp4"},
                "int8": {"bits": 8},
            },
            compute_dtypes={"cpu": "float32"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems((BITSANDBYTES,))
        problems += broken + device_problems(device, CAPABILITIES)
        if not problems:
            from polyquant_bitsandbytes._load import native_problems

            problems += native_problems(device)
        return problems

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> BitsAndBytesOptions:
        return convert(BitsAndBytesOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: BitsAndBytesOptions) -> LoadedModel:
        from polyquant_bitsandbytes import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_bitsandbytes import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: BitsAndBytesOptions) -> list[LayerPlan]:
        from polyquant_bitsandbytes.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def save(self, loaded: LoadedModel, out: Path) -> Path:
        from polyquant_bitsandbytes import _load

        return _load.save(loaded, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_bitsandbytes import _load

        return _load.prepare_for_training(loaded)


backend = BitsAndBytesBackend()
