"""The compressed-tensors backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend

from polyquant_compressed_tensors.options import CompressedTensorsOptions

LIBRARY = Library(distribution="compressed-tensors", versions=">=0.19,<0.20", module="compressed_tensors")
SCHEMES = (
    "int4", "int8", "int8-dynamic", "int8-static", "fp8", "fp8-dynamic", "fp8-static", "mxfp8", "mxfp8-dynamic",
    "mxfp4", "mxfp4-dynamic", "nvfp4", "nvfp4-dynamic", "sparse",
)  # fmt: skip
INFO = BackendInfo(
    name="compressed-tensors",
    summary="checkpoints of llm-compressor, as vLLM serves them: int4, int8, fp8, mxfp8, mxfp4, nvfp4, 2:4 sparse",
    capabilities=Capabilities(
        bits=(4, 8),
        schemes=SCHEMES,
        devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
        loads_prequantized=("compressed-tensors",),
        saves=True,
        readable_by=("transformers",),
        trains=True,
    ),
    options=CompressedTensorsOptions,
    docs="https://github.com/vllm-project/compressed-tensors",
    also_called=("compressed_tensors", "llmcompressor"),
    libraries=(LIBRARY, Library(distribution="accelerate", versions=">=1.6")),
    presets={
        "int4": {"weights": "int4"},
        "int8": {"weights": "int8"},
        "fp8": {"weights": "fp8"},
        "int4-gptq": {"weights": "int4", "group_size": 64, "method": "gptq"},
    },
    measured_kl={"int4": 0.399, "int8": 0.00417, "fp8": 0.0165, "int4-gptq": 0.162},
    compute_dtypes={"cpu": "bfloat16"},
)
HOOKS = ("plan_layers", "quantize", "save", "prepare_for_training", "pack", "unpack")
backend = PluginBackend(INFO, HOOKS, imports=(LIBRARY,))
