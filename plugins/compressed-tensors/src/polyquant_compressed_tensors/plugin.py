"""The compressed-tensors backend: its card and its hooks. Imports nothing heavy."""

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

from polyquant_compressed_tensors.options import CompressedTensorsOptions

LIBRARY = Library(distribution="compressed-tensors", versions=">=0.19,<0.20", module="compressed_tensors")
LIBRARIES = (LIBRARY, Library(distribution="accelerate", versions=">=1.6"))
CAPABILITIES = Capabilities(
    bits=(4, 8),
    schemes=("int4", "int8", "int8-dynamic", "fp8", "fp8-dynamic", "mxfp4", "nvfp4"),
    devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
    loads_prequantized=("compressed-tensors",),
    saves=True,
    trains=True,
)


class CompressedTensorsBackend:
    """Hook implementations; the work is in `_load.py`, `_layers.py` and `_quantize.py`."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="compressed-tensors",
            summary="checkpoints of llm-compressor, as vLLM serves them: int4, int8, fp8, mxfp4, nvfp4",
            capabilities=CAPABILITIES,
            options=CompressedTensorsOptions,
            docs="https://github.com/vllm-project/compressed-tensors",
            libraries=LIBRARIES,
            presets={
                "int4": {"weights": "int4", "group_size": 64},
                "int8": {"weights": "int8"},
                "fp8": {"weights": "fp8"},
                "int4-gptq": {"weights": "int4", "group_size": 64, "method": "gptq"},
            },
            compute_dtypes={"cpu": "bfloat16"},
        )

    @hookimpl
    def validate_environment(self, device: str) -> list[Problem]:
        problems = library_problems(LIBRARIES)
        broken = [] if problems else import_problems((LIBRARY,))
        return problems + broken + device_problems(device, CAPABILITIES)

    @hookimpl
    def build_config(self, options: Mapping[str, object]) -> CompressedTensorsOptions:
        return convert(CompressedTensorsOptions, options)

    @hookimpl
    def load(self, request: LoadRequest, config: CompressedTensorsOptions) -> LoadedModel:
        from polyquant_compressed_tensors import _load

        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model: Any) -> list[LayerInfo]:
        from polyquant_compressed_tensors import _layers

        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights: Sequence[WeightInfo], config: CompressedTensorsOptions) -> list[LayerPlan]:
        from polyquant_compressed_tensors.planning import plan_layers

        return plan_layers(weights, config)

    @hookimpl
    def quantize(
        self, request: LoadRequest, config: CompressedTensorsOptions, calibration: Sequence[str], out: Path
    ) -> Path:
        from polyquant_compressed_tensors.quantizing import quantize

        return quantize(request, config, calibration, out)

    @hookimpl
    def save(self, loaded: LoadedModel, out: Path) -> Path:
        from polyquant_compressed_tensors import _load

        return _load.save(loaded, out)

    @hookimpl
    def prepare_for_training(self, loaded: LoadedModel) -> Any:
        from polyquant_compressed_tensors import _load

        return _load.prepare_for_training(loaded)


backend = CompressedTensorsBackend()
