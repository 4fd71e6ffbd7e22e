"""The AQLM backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, PluginBackend

from polyquant_aqlm.options import AqlmOptions

INFO = BackendInfo(
    name="aqlm",
    summary="reads AQLM checkpoints: groups of weights as sums of codebook vectors, good at 2 bit",
    capabilities=Capabilities(
        bits=(1, 2, 3, 4, 5, 6, 7, 8),
        schemes=("aqlm",),
        devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 0))),
        loads_prequantized=("aqlm",),
        saves=True,
        readable_by=("transformers",),
        trains=True,
    ),
    options=AqlmOptions,
    docs="https://github.com/Vahe1994/AQLM",
    libraries=(
        Library(distribution="aqlm", versions=">=1.1.6,<1.2"),
        Library(distribution="numba", versions=">=0.59"),
    ),
    presets={
        "2x8": {"num_codebooks": 2, "nbits_per_codebook": 8},
        "4x8": {"num_codebooks": 4, "nbits_per_codebook": 8},
    },
    measured_kl={"2x8": 10.2, "4x8": 1.03},
    compute_dtypes={"cpu": "float32"},
)
backend = PluginBackend(INFO, ("plan_layers", "save", "prepare_for_training"), imports=INFO.libraries)
