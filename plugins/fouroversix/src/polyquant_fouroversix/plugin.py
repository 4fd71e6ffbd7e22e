"""The Four Over Six backend: its card. Imports nothing heavy."""

from __future__ import annotations

import msgspec
from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend, Problem

from polyquant_fouroversix.options import FouroversixOptions

FOUROVERSIX = Library(distribution="fouroversix", versions=">=1.0.5,<1.1")
INSTALL = (
    "pip install 'setuptools>=77.0.3' packaging, then: "
    "SKIP_CUDA_BUILD=1 FORCE_BUILD=1 pip install --no-build-isolation '{}' (its setup.py imports torch; "
    "without these variables it needs nvcc, or fetches a wheel with CUDA kernels, which are not used here)"
)
INFO = BackendInfo(
    name="fouroversix",
    summary="NVFP4 with adaptive block scaling (4/6), MXFP4, IF4 and NVINT4, packed on any device",
    capabilities=Capabilities(
        bits=(4,),
        schemes=("nvfp4", "mxfp4", "if4", "nvint4"),
        devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
        on_the_fly=True,
        loads_prequantized=("fouroversix",),
        saves=True,
        readable_by=("transformers",),
        trains=True,
    ),
    options=FouroversixOptions,
    docs="https://github.com/mit-han-lab/fouroversix",
    libraries=(
        FOUROVERSIX,
        Library(distribution="torch", versions=">=2.7"),
        Library(distribution="transformers", versions=">=5.2"),
        Library(distribution="accelerate", versions=">=1.6"),
    ),
    presets={
        "nvfp4": {"dtype": "nvfp4", "scale_rule": "mse"},
        "if4": {"dtype": "if4", "scale_rule": "mse"},
        "mxfp4": {"dtype": "mxfp4", "scale_rule": "static_6"},
    },
    measured_kl={"nvfp4": 0.415, "if4": 0.36, "mxfp4": 1.07},
    compute_dtypes={"cpu": "float32"},
)


class FouroversixBackend(PluginBackend):
    """The hooks, with the command that installs the library, which takes more than its name."""

    def library_problems(self) -> list[Problem]:
        return [
            msgspec.structs.replace(problem, fix=INSTALL.format(FOUROVERSIX.requirement))
            if problem.what.startswith(f"{FOUROVERSIX.distribution} ")
            else problem
            for problem in super().library_problems()
        ]


backend = FouroversixBackend(
    INFO, ("plan_layers", "save", "prepare_for_training", "pack", "quantize_linear", "unpack"), imports=INFO.libraries
)
