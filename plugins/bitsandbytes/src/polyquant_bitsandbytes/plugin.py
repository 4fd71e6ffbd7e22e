"""The bitsandbytes backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend

from polyquant_bitsandbytes.options import BitsAndBytesOptions

BITSANDBYTES = Library(distribution="bitsandbytes", versions=">=0.48,<0.51")
TRANSFORMERS = Library(distribution="transformers", versions=">=4.53")  # before, it asks for Intel's extension on CPUs
INFO = BackendInfo(
    name="bitsandbytes",
    summary="NF4, FP4 and LLM.int8 while loading; the base of QLoRA",
    capabilities=Capabilities(
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
        readable_by=("transformers",),
        trains=True,
        compiles=True,
        offloads=True,
    ),
    options=BitsAndBytesOptions,
    docs="https://huggingface.co/docs/bitsandbytes",
    also_called=("bnb",),
    libraries=(BITSANDBYTES, Library(distribution="accelerate", versions=">=1.6"), TRANSFORMERS),
    presets={
        "nf4": {"bits": 4, "quant_type": "nf4"},
        "nf4-dq": {"bits": 4, "quant_type": "nf4", "double_quant": True},
        "fp4": {"bits": 4, "quant_type": "fp4"},
        "int8": {"bits": 8},
    },
    measured_kl={"nf4": 0.249, "nf4-dq": 0.249, "fp4": 0.448, "int8": 0.0175},
    compute_dtypes={"cpu": "float32"},
)
backend = PluginBackend(
    INFO,
    ("plan_layers", "save", "prepare_for_training", "pack", "quantize_linear", "unpack"),
    imports=(BITSANDBYTES,),
    native_problems=True,
)
