"""The GPTQ and AWQ backends: their cards. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, Library, Mark, PluginBackend

from polyquant_gptqmodel.options import AwqOptions, GptqOptions

GPTQMODEL = Library(
    distribution="gptqmodel", versions=">=7.7,<8",
    caution="it asks for torch 2.14.1 or newer, and with --no-deps runs on 2.13",
)  # fmt: skip
LIBRARIES = (
    GPTQMODEL,
    Library(distribution="torch", versions=">=2.13"),  # gptqmodel's metadata asks for 2.14.1; 2.13 is tested
    Library(distribution="transformers", versions=">=5.20"),  # gptqmodel asks for it
    Library(distribution="accelerate", versions=">=1.6"),
)
DOCS = "https://github.com/ModelCloud/GPTQModel"
DEVICES = (DeviceSupport(type="cpu"), DeviceSupport(type="cuda", minimum_capability=(7, 5)))
GPTQ = BackendInfo(
    name="gptq",
    summary="calibrated 2 to 8 bit weights; reads the GPTQ checkpoints of gptqmodel and auto-gptq",
    capabilities=Capabilities(
        bits=(2, 3, 4, 8),
        schemes=("gptq2", "gptq3", "gptq4", "gptq8"),
        devices=DEVICES,
        needs_calibration=True,
        loads_prequantized=("gptq",),
        trains=True,
    ),
    options=GptqOptions,
    docs=DOCS,
    marks=(Mark(method="gptq", file="quantize_config.json"),),
    also_called=("gptqmodel",),
    libraries=LIBRARIES,
    presets={
        "int4": {"bits": 4, "group_size": 64},
        "int8": {"bits": 8, "group_size": 64},
        "int4-act-order": {"bits": 4, "group_size": 64, "desc_act": True},
    },
    measured_kl={"int4": 0.167, "int8": 0.00193, "int4-act-order": 0.302},
    compute_dtypes={"cpu": "bfloat16"},
)
AWQ = BackendInfo(
    name="awq",
    summary="calibrated 4-bit weights; reads the AWQ checkpoints of autoawq and gptqmodel",
    capabilities=Capabilities(
        bits=(4,),
        schemes=("awq4",),
        devices=DEVICES,
        needs_calibration=True,
        loads_prequantized=("awq",),
        trains=True,
    ),
    options=AwqOptions,
    docs=DOCS,
    marks=(Mark(method="awq", file="quant_config.json"),),
    libraries=LIBRARIES,
    presets={"int4": {"group_size": 64}},
    measured_kl={"int4": 0.147},
    compute_dtypes={"cpu": "bfloat16"},
)
HOOKS = ("plan_layers", "quantize", "prepare_for_training", "pack", "unpack")
gptq = PluginBackend(GPTQ, HOOKS, imports=(GPTQMODEL,))
awq = PluginBackend(AWQ, HOOKS, imports=(GPTQMODEL,))
