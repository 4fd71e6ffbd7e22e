"""The rowwise backend: its card. Imports nothing heavy."""

from __future__ import annotations

from polyquant.plugin import BackendInfo, Capabilities, DeviceSupport, PluginBackend

from polyquant_rowwise.options import QUANT_METHOD, RowwiseOptions
from polyquant_rowwise.planning import SCHEME

INFO = BackendInfo(
    name="rowwise",
    # Replace: summary, docs, presets (the first is the default), the dtype that is best on each device, and
    # libraries=(Library(distribution="acme", versions=">=2.1,<3"),) for what you stand on.
    summary="8 bit with one scale for each output row, in plain torch",
    # Replace: what your backend can do. Each entry is a promise that `polyquant check-backend rowwise` tests.
    capabilities=Capabilities(
        bits=(8,),
        schemes=(SCHEME,),
        devices=(DeviceSupport(type="cpu"), DeviceSupport(type="cuda")),
        on_the_fly=True,
        loads_prequantized=(QUANT_METHOD,),
        saves=True,
        trains=True,
    ),
    options=RowwiseOptions,
    docs="https://example.org/polyquant-rowwise",
    presets={"int8": {"bits": 8}, "int8-bf16-scales": {"bits": 8, "scale_dtype": "bfloat16"}},
    compute_dtypes={"cpu": "float32"},
)
# Replace: the optional hooks that you have. A hook is the function of its name in `_load.py`, `_layers.py` or
# `planning.py`; imports=INFO.libraries has `polyquant doctor` import your library, to see that it works.
backend = PluginBackend(INFO, ("plan_layers", "save", "prepare_for_training", "pack", "quantize_linear", "unpack"))
