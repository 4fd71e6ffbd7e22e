"""The VPTQ, HIGGS, SpQR and EXL3 backends: their cards. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend

from polyquant_codebooks.exl3.options import Exl3Options
from polyquant_codebooks.higgs.options import HiggsOptions
from polyquant_codebooks.spqr.options import SpqrOptions
from polyquant_codebooks.vptq.options import VptqOptions

LIBRARIES = (
    Library(distribution="torch", versions=">=2.7"),
    Library(distribution="transformers", versions=">=4.52"),
    Library(distribution="accelerate", versions=">=1.6"),
)
DEVICES = (DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0)))
VPTQ = BackendInfo(
    name="vptq",
    summary="reads VPTQ checkpoints: vectors of weights from learned tables, 1 to 4 bits",
    capabilities=Capabilities(
        bits=(1, 2, 3, 4), schemes=("vptq",), devices=DEVICES, loads_prequantized=("vptq",), saves=True, trains=True
    ),
    options=VptqOptions,
    docs="https://github.com/microsoft/VPTQ",
    libraries=LIBRARIES,
    presets={"2bit": {}},
    compute_dtypes={"cpu": "float32"},
)
HIGGS = BackendInfo(
    name="higgs",
    summary="2 to 4 bits without calibration: rotated rows, rounded in pairs to a grid for normal numbers",
    capabilities=Capabilities(
        bits=(2, 3, 4), schemes=("higgs2", "higgs3", "higgs4"), devices=DEVICES, on_the_fly=True,
        loads_prequantized=("higgs",), saves=True, trains=True,
    ),
    options=HiggsOptions,
    docs="https://huggingface.co/docs/transformers/quantization/higgs",
    libraries=LIBRARIES,
    presets={"4bit": {"bits": 4}},
    compute_dtypes={"cpu": "float32"},
)  # fmt: skip
SPQR = BackendInfo(
    name="spqr",
    summary="reads SpQR checkpoints: 3 bits, scales in 3 bits too, outliers beside them",
    capabilities=Capabilities(
        bits=(3,), schemes=("spqr3",), devices=DEVICES, loads_prequantized=("spqr",), saves=True, trains=True
    ),
    options=SpqrOptions,
    docs="https://github.com/Vahe1994/SpQR",
    libraries=LIBRARIES,
    presets={"3bit": {"bits": 3}},
    compute_dtypes={"cpu": "float32"},
)
EXL3 = BackendInfo(
    name="exl3",
    summary="reads EXL3 checkpoints (exllamav3), 1 to 8 bits, anywhere; slow off an NVIDIA GPU",
    capabilities=Capabilities(
        bits=(1, 2, 3, 4, 5, 6, 7, 8), schemes=("exl3",), devices=DEVICES, loads_prequantized=("exl3",), saves=True,
        trains=True,
    ),
    options=Exl3Options,
    docs="https://github.com/turboderp-org/exllamav3",
    also_called=("exllamav3",),
    libraries=LIBRARIES,
    presets={"4bit": {"bits": 4}},
    compute_dtypes={"cpu": "float32"},
)  # fmt: skip
HOOKS = ("plan_layers", "save", "prepare_for_training")
PACKAGE = "polyquant_codebooks"
vptq = PluginBackend(VPTQ, HOOKS, imports=LIBRARIES, package=PACKAGE)
higgs = PluginBackend(HIGGS, HOOKS, imports=LIBRARIES, package=PACKAGE)
spqr = PluginBackend(SPQR, HOOKS, imports=LIBRARIES, package=PACKAGE)
exl3 = PluginBackend(EXL3, HOOKS, imports=LIBRARIES, package=PACKAGE)
