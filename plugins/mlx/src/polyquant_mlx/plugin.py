"""The MLX backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, Mark, PluginBackend

from polyquant_mlx.formats import BITS, FLOATS
from polyquant_mlx.names import RENAMES
from polyquant_mlx.options import MlxOptions

INFO = BackendInfo(
    name="mlx",
    summary="MLX's 2 to 8 bit integers and 4 and 8 bit floats: read, written and run without an Apple machine",
    capabilities=Capabilities(
        bits=BITS,
        schemes=(*(f"affine{bits}" for bits in BITS), *FLOATS),
        devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
        on_the_fly=True,
        loads_prequantized=("mlx", "metal"),
        saves=True,
        readable_by=("mlx-lm",),
        trains=True,
    ),
    options=MlxOptions,
    docs="https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html",
    libraries=(
        Library(distribution="torch", versions=">=2.7"),
        Library(distribution="transformers", versions=">=5.2"),
        Library(distribution="accelerate", versions=">=1.6"),
    ),
    presets={
        "int4": {"bits": 4, "group_size": 64},
        "int8": {"bits": 8, "group_size": 64},
        "mxfp4": {"mode": "mxfp4"},
    },
    marks=(
        Mark(method="metal", tensors=("weight:uint32", "scales", "qbiases")),
        Mark(method="mlx", key="quantization", fields=("group_size", "bits"), tensors=("weight:uint32", "scales"),
             names=RENAMES),
    ),
    also_called=("metal", "mlx-lm", "mlx_lm"),
    compute_dtypes={"cpu": "float32"},
)  # fmt: skip
HOOKS = ("plan_layers", "save", "prepare_for_training", "pack", "quantize_linear", "unpack", "write_unpacked")
backend = PluginBackend(INFO, HOOKS, imports=INFO.libraries)
