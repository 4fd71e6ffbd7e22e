"""The torchao backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend

from polyquant_torchao.options import TorchAoOptions

TORCHAO = Library(distribution="torchao", versions=">=0.18,<0.19")
INFO = BackendInfo(
    name="torchao",
    summary="int8, int4 and float8 weights as tensor subclasses; int8 activations if asked",
    capabilities=Capabilities(
        bits=(8,),
        schemes=("int8", "int8-dynamic", "int4-in-int8", "float8"),
        devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(8, 0))),
        on_the_fly=True,
        loads_prequantized=("torchao",),
        saves=True,
        readable_by=("transformers",),
        trains=True,
        compiles=True,
    ),
    options=TorchAoOptions,
    docs="https://docs.pytorch.org/ao",
    also_called=("ao",),
    libraries=(
        TORCHAO,
        Library(distribution="transformers", versions=">=5"),  # older ones save torchao's tensors with pickle only
        Library(distribution="accelerate", versions=">=1.6"),
    ),
    presets={
        "int8": {"weights": "int8"},
        "int8-dynamic": {"weights": "int8", "dynamic_activations": True},
        "int4": {"weights": "int4"},
        "float8": {"weights": "float8"},
    },
    measured_kl={"int8": 0.00298, "int8-dynamic": 0.0275, "int4": 0.389, "float8": 0.0182},
    compute_dtypes={"cpu": "float32"},
)
backend = PluginBackend(
    INFO, ("plan_layers", "save", "prepare_for_training", "pack", "quantize_linear"), imports=(TORCHAO,)
)
