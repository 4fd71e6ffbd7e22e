"""The autoawq backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Isolated, Library, PluginBackend

from polyquant_autoawq.options import AutoawqOptions

AUTOAWQ = Library(distribution="autoawq", versions="==0.2.9", module="awq")
ISOLATED = Isolated(
    reason="autoawq 0.2.9 is archived, and imports nothing newer than transformers 4.51.3",
    requirements=(
        "torch==2.13.0", "transformers==4.51.3", "accelerate==1.6.0", "datasets==5.0.1", "zstandard==0.25.0",
    ),
    without_dependencies=("autoawq==0.2.9",),  # it asks for triton, which it can do without
)  # fmt: skip
INFO = BackendInfo(
    name="autoawq",
    summary="AutoAWQ 0.2.9, archived: reads AWQ checkpoints and makes them, in an environment of its own",
    capabilities=Capabilities(
        bits=(4,),
        schemes=("awq4",),
        devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 5))),
        needs_calibration=True,
        loads_prequantized=("awq",),
    ),
    options=AutoawqOptions,
    docs="https://github.com/casper-hansen/AutoAWQ",
    also_called=("auto-awq", "auto_awq"),
    libraries=(AUTOAWQ, Library(distribution="transformers", versions=">=4.51,<4.52")),
    presets={"int4": {"group_size": 64}},
    compute_dtypes={"cpu": "float32"},
    isolated=ISOLATED,
)
backend = PluginBackend(INFO, ("plan_layers", "quantize", "pack"), imports=(AUTOAWQ,))
