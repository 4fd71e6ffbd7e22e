"""The autogptq backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Isolated, Library, PluginBackend

from polyquant_autogptq.options import AutogptqOptions

AUTO_GPTQ = Library(distribution="auto-gptq", versions="==0.7.1", module="auto_gptq")
ISOLATED = Isolated(
    reason="auto-gptq 0.7.1 is archived, and imports nothing newer than transformers 4.51.3",
    requirements=(
        "torch==2.13.0", "transformers==4.51.3", "accelerate==1.6.0", "peft==0.15.2", "datasets==5.0.1",
        "gekko==1.3.3", "sentencepiece==0.2.3",
    ),
    without_dependencies=("auto-gptq==0.7.1",),  # it asks for rouge, which only its evaluation tasks use
)  # fmt: skip
INFO = BackendInfo(
    name="autogptq",
    summary="auto-gptq 0.7.1, archived: reads GPTQ checkpoints and makes them, in an environment of its own",
    capabilities=Capabilities(
        bits=(2, 3, 4, 8),
        schemes=("gptq2", "gptq3", "gptq4", "gptq8"),
        devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(6, 0))),
        needs_calibration=True,
        loads_prequantized=("gptq",),
    ),
    options=AutogptqOptions,
    docs="https://github.com/AutoGPTQ/AutoGPTQ",
    also_called=("auto-gptq", "auto_gptq"),
    libraries=(AUTO_GPTQ, Library(distribution="transformers", versions=">=4.51,<4.52")),
    presets={"int4": {"bits": 4, "group_size": 64}, "int8": {"bits": 8, "group_size": 64}},
    compute_dtypes={"cpu": "float32"},
    isolated=ISOLATED,
)
backend = PluginBackend(INFO, ("plan_layers", "quantize", "pack"), imports=(AUTO_GPTQ,))
