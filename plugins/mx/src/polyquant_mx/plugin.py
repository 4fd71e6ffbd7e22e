"""The cards of five backends for block floats: mxfp4, mxfp8, nvfp4, modelopt and fp-quant. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, Mark, PluginBackend

from polyquant_mx.options import FpQuantOptions, ModelOptOptions, Mxfp4Options, Mxfp8Options, Nvfp4Options

DEVICES = (DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0)))
LIBRARIES = (
    Library(distribution="torch", versions=">=2.7"),
    Library(distribution="transformers", versions=">=4.55"),
    Library(distribution="accelerate", versions=">=1.6"),
)
MXFP4 = BackendInfo(
    name="mxfp4",
    summary="MXFP4 as gpt-oss has it, fused experts packed too; quantizes linear layers and experts on the fly",
    capabilities=Capabilities(
        bits=(4,), schemes=("mxfp4",), devices=DEVICES, on_the_fly=True, loads_prequantized=("mxfp4",), saves=True,
        trains=True,
    ),
    options=Mxfp4Options,
    docs="https://huggingface.co/docs/transformers/quantization/mxfp4",
    libraries=LIBRARIES,
    presets={"mxfp4": {"linears": "auto"}},
    marks=tuple(
        Mark(method="mxfp4", tensors=(f"{name}_blocks", f"{name}_scales")) for name in ("down_proj", "weight")
    ),
    compute_dtypes={"cpu": "float32"},
)  # fmt: skip
MXFP8 = BackendInfo(
    name="mxfp8",
    summary="MXFP8: E4M3 in blocks of 32 whose scale is a power of two",
    capabilities=Capabilities(
        bits=(8,), schemes=("mxfp8",), devices=DEVICES, on_the_fly=True, loads_prequantized=("mxfp8",), saves=True,
        readable_by=("transformers",), trains=True,
    ),
    options=Mxfp8Options,
    docs="https://huggingface.co/docs/transformers/quantization/finegrained_fp8",
    libraries=LIBRARIES,
    presets={"mxfp8": {}},
    compute_dtypes={"cpu": "float32"},
)  # fmt: skip
NVFP4 = BackendInfo(
    name="nvfp4",
    summary="NVFP4 weights on the fly, in the layout of NVIDIA ModelOpt",
    capabilities=Capabilities(
        bits=(4,), schemes=("nvfp4",), devices=DEVICES, on_the_fly=True, loads_prequantized=("modelopt",), saves=True,
        trains=True,
    ),
    options=Nvfp4Options,
    docs="https://nvidia.github.io/Model-Optimizer/",
    libraries=LIBRARIES,
    presets={"nvfp4": {}},
    compute_dtypes={"cpu": "float32"},
)  # fmt: skip
MODELOPT = BackendInfo(
    name="modelopt",
    summary="the checkpoints of NVIDIA ModelOpt: FP8, NVFP4, MXFP8 and INT4 weights, and mixtures of them",
    capabilities=Capabilities(
        bits=(4, 8), schemes=("nvfp4", "fp8", "fp8-channel", "fp8-block", "mxfp8", "int4"), devices=DEVICES,
        on_the_fly=True, loads_prequantized=("modelopt",), saves=True, trains=True,
    ),
    options=ModelOptOptions,
    docs="https://nvidia.github.io/Model-Optimizer/",
    libraries=LIBRARIES,
    presets={"nvfp4": {"quant_algo": "W4A16_NVFP4"}, "fp8": {"quant_algo": "FP8"}},
    marks=(Mark(method="modelopt", file="hf_quant_config.json"),),
    compute_dtypes={"cpu": "float32"},
)  # fmt: skip
FP_QUANT = BackendInfo(
    name="fp-quant",
    summary="FP-Quant: NVFP4 or MXFP4 of weights that a Hadamard matrix has rotated",
    capabilities=Capabilities(
        bits=(4,), schemes=("nvfp4-rotated", "mxfp4-rotated"), devices=DEVICES, on_the_fly=True,
        loads_prequantized=("fp_quant",), saves=True, trains=True,
    ),
    options=FpQuantOptions,
    docs="https://github.com/IST-DASLab/FP-Quant",
    libraries=LIBRARIES,
    presets={"nvfp4": {"forward_dtype": "nvfp4"}, "mxfp4": {"forward_dtype": "mxfp4"}},
    compute_dtypes={"cpu": "float32"},
)  # fmt: skip
HOOKS = ("plan_layers", "save", "prepare_for_training")
PACKED = (*HOOKS, "pack", "quantize_linear")
mxfp8 = PluginBackend(MXFP8, PACKED, imports=LIBRARIES)
mxfp4, nvfp4, modelopt = (
    PluginBackend(card, (*PACKED, "unpack"), imports=LIBRARIES) for card in (MXFP4, NVFP4, MODELOPT)
)
fp_quant = PluginBackend(FP_QUANT, HOOKS, imports=LIBRARIES)
