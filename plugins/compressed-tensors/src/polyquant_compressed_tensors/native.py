"""compressed-tensors' own records of our options. Imports the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

if TYPE_CHECKING:
    from polyquant_compressed_tensors.options import CompressedTensorsOptions


def scheme(options: CompressedTensorsOptions) -> QuantizationScheme:
    """The scheme of every quantized layer."""
    import torch

    from polyquant_compressed_tensors.options import BITS, BLOCK

    kind = "int" if options.weights.startswith("int") else "float"
    weights: dict[str, Any] = {"num_bits": BITS[options.weights], "type": kind, "symmetric": options.symmetric}
    weights |= {"strategy": options.strategy, "group_size": options.group_size}
    if options.strategy == "block":
        weights["block_structure"] = list(BLOCK)
    if options.weights in ("mxfp4", "nvfp4"):
        weights["scale_dtype"] = torch.uint8 if options.weights == "mxfp4" else torch.float8_e4m3fn
        weights["zp_dtype"] = weights["scale_dtype"]
    activations = None
    if options.dynamic_activations:
        activations = QuantizationArgs(
            num_bits=8, type=kind, symmetric=True, dynamic=True, observer=None, **_activations(options)
        )
    return QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=activations,
        format=options.packed_format,
    )  # fmt: skip


def _activations(options: CompressedTensorsOptions) -> dict[str, Any]:
    return {"strategy": "group", "group_size": 128} if options.strategy == "block" else {"strategy": "token"}
