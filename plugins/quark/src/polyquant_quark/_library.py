"""amd-quark's own config of a weight, and amd-quark without its talk. Reading checkpoints needs none of it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from polyquant.plugin import Library, contained
from polyquant.plugin.process import wait_for_build
from torch.utils import cpp_extension

from polyquant_quark.options import QuarkOptions

AMD_QUARK = Library(distribution="amd-quark", versions=">=0.13,<0.14", module="quark.torch")
COMPILED = "quark_hw_emulation_stable_abi"  # what amd-quark compiles where it is first imported, by torch's name of it
LIMITS = ("recompile_limit", "accumulated_recompile_limit")  # raised at its import, for the whole process


def tensor_config(options: QuarkOptions) -> Any:
    """The QTensorConfig of the weights. Imports amd-quark, for many seconds."""
    from quark.torch.quantization.config import config as quark

    group: dict[str, Any] = {"ch_axis": -1, "group_size": options.group_size}
    channel: dict[str, Any] = {"ch_axis": 0}
    rounding: dict[str, Any] = {"symmetric": True, "scale_type": "float", "round_method": "half_even"}
    shifted = {**rounding, "symmetric": False}
    static: dict[str, Any] = {"is_dynamic": False}
    makers = {
        ("int4", "group"): lambda: quark.Int4PerGroupSpec(**group),
        ("int4", "channel"): lambda: quark.Int4PerChannelSpec(**channel),
        ("uint4", "group"): lambda: quark.Uint4PerGroupSpec(**group, **shifted, **static),
        ("uint4", "channel"): lambda: quark.Uint4PerChannelSpec(**channel, **shifted, **static),
        ("int8", "channel"): lambda: quark.Int8PerChannelSpec(**channel, **rounding, **static),
        ("int8", "group"): lambda: quark.Int8PerGroupSpec(**group, **rounding, **static),
        ("fp8", "channel"): lambda: quark.FP8E4M3PerChannelSpec(**channel, **static),
        ("fp8", "tensor"): lambda: quark.FP8E4M3PerTensorSpec(observer_method="min_max", **static),
        ("mxfp4", "group"): lambda: quark.OCP_MXFP4Spec(ch_axis=-1, **static),
    }
    return makers[options.weights, options.granularity or ""]().to_quantization_spec()


def wait_for_kernels() -> None:
    """Wait while another process compiles amd-quark's kernels: torch waits for ever for one that was killed."""
    if "quark.torch.kernel" not in sys.modules:
        folder = Path(cpp_extension._get_build_directory(COMPILED, verbose=False))
        for note in wait_for_build(folder):
            logging.getLogger(__name__).warning(note)


@contextmanager
def quiet_quark(*, progress: bool) -> Iterator[None]:
    """In the block Quark says nothing, and draws its bars only where `progress`; nothing is compiled by torch.

    Random state, environment, warning filters and dynamo's limits are afterwards what they were before.
    """
    limits = {name: getattr(torch._dynamo.config, name) for name in LIMITS}
    try:
        with (
            contained(progress=progress), torch.random.fork_rng(), torch.compiler.set_stance("force_eager"),
        ):  # fmt: skip
            yield
    finally:
        for name, value in limits.items():
            setattr(torch._dynamo.config, name, value)
