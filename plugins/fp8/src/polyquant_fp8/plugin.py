"""The FP8 backends: their cards. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend

from polyquant_fp8.options import FbgemmOptions, Fp8Options

LIBRARIES = (
    Library(distribution="torch", versions=">=2.7"),
    Library(distribution="transformers", versions=">=4.52"),
    Library(distribution="accelerate", versions=">=1.6"),
)
DEVICES = (DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0)))
INFO = BackendInfo(
    name="fp8",
    summary="fine-grained FP8: e4m3 weights in scaled blocks, packed on any device",
    capabilities=Capabilities(
        bits=(8, 4),  # 4: experts of DeepSeek-V4's checkpoints
        schemes=("fp8-e4m3", "fp4-e2m1"),
        devices=DEVICES,
        on_the_fly=True,
        loads_prequantized=("fp8",),
        saves=True,
        readable_by=("transformers",),
        trains=True,
        compiles=True,
    ),
    options=Fp8Options,
    docs="https://huggingface.co/docs/transformers/quantization/finegrained_fp8",
    libraries=LIBRARIES,
    presets={
        "block128": {"block_rows": 128, "block_columns": 128},
        "ue8m0": {"block_rows": 128, "block_columns": 128, "scale_fmt": "ue8m0"},
        "tensor": {"block_rows": 0, "block_columns": 0},
    },
    measured_kl={"block128": 0.0154, "ue8m0": 0.016, "tensor": 0.0153},
    compute_dtypes={"cpu": "float32"},
)
FBGEMM = BackendInfo(
    name="fbgemm-fp8",
    summary="FP8 with a scale for each row, of Llama's FP8 checkpoints; packed on any device",
    capabilities=Capabilities(
        bits=(8,),
        schemes=("fp8-e4m3",),
        devices=DEVICES,
        on_the_fly=True,
        loads_prequantized=("fbgemm_fp8",),
        saves=True,
        trains=True,
        compiles=True,
    ),
    options=FbgemmOptions,
    docs="https://huggingface.co/docs/transformers/quantization/fbgemm_fp8",
    also_called=("fbgemm", "fbgemm_fp8"),
    libraries=LIBRARIES,
    presets={"rows": {}},
    compute_dtypes={"cpu": "float32"},
)
HOOKS = ("plan_layers", "save", "prepare_for_training", "pack", "quantize_linear")
backend = PluginBackend(INFO, HOOKS, imports=LIBRARIES)
fbgemm = PluginBackend(FBGEMM, HOOKS, imports=LIBRARIES)
