"""The EETQ and Gemma backends: their cards. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend

from polyquant_row_scales.options import EetqOptions, GemmaOptions

LIBRARIES = (
    Library(distribution="torch", versions=">=2.7"),
    Library(distribution="transformers", versions=">=4.52"),
    Library(distribution="accelerate", versions=">=1.6"),
)
DEVICES = (DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0)))
EETQ = BackendInfo(
    name="eetq",
    summary="8-bit integers with a scale for each row, as EETQ's GPU kernels store them; packed on any device",
    capabilities=Capabilities(
        bits=(8,),
        schemes=("eetq8",),
        devices=DEVICES,
        on_the_fly=True,
        loads_prequantized=("eetq",),
        saves=True,
        trains=True,
        compiles=True,
    ),
    options=EetqOptions,
    docs="https://huggingface.co/docs/transformers/quantization/eetq",
    libraries=LIBRARIES,
    presets={"int8": {"weights": "int8"}},
    compute_dtypes={"cpu": "float32"},
)
GEMMA = BackendInfo(
    name="gemma",
    summary="Google's quantized Gemma checkpoints: 2, 4 and 8 bits a row, activations rounded as they were calibrated",
    capabilities=Capabilities(
        bits=(2, 4, 8),
        schemes=("gemma2", "gemma4", "gemma8"),
        devices=DEVICES,
        on_the_fly=True,
        loads_prequantized=("gemma",),
        saves=True,
        readable_by=("transformers",),
        trains=True,
        compiles=True,
    ),
    options=GemmaOptions,
    docs="https://huggingface.co/docs/transformers/main_classes/quantization",
    libraries=LIBRARIES,
    presets={"int8": {"num_bits": 8}, "int4": {"num_bits": 4}},
    compute_dtypes={"cpu": "float32"},
)
HOOKS = ("plan_layers", "save", "prepare_for_training")
eetq = PluginBackend(EETQ, (*HOOKS, "pack", "quantize_linear"), imports=LIBRARIES)
gemma = PluginBackend(GEMMA, HOOKS, imports=LIBRARIES)
