"""The number formats, and the names that checkpoints give to a layer's tensors. No torch.

Sources: OCP Microscaling Formats 1.0; transformers.integrations.mxfp4 and .finegrained_fp8; modelopt.torch.export and
.quantization.qtensor of nvidia-modelopt 0.47; fp_quant 0.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Any, Literal, NamedTuple

from polyquant.errors import Misfit
from polyquant.plugin import E2M1, Activations, HeldWeight, PackedFormat, WeightInfo, module_of, require_read
from polyquant.plugin import activation_formats as activations

ITEM_BYTES = {"uint8": 1, "float8_e4m3fn": 1, "float32": 4}
SCALE_DTYPES = {"e8m0": "uint8", "e4m3": "float8_e4m3fn", "float32": "float32"}
"""E8M0 scales are bytes."""
PACKED_SCALES: Mapping[str, Literal["bfloat16", "float8_e4m3fn", "float32"]] = {
    "e8m0": "bfloat16", "e4m3": "float8_e4m3fn", "float32": "float32",
}  # fmt: skip
"""With kernel="packed"."""


class Scheme(NamedTuple):
    """A number format. A weight is code * scale of its block, and where a matrix has a scale, times that or by it."""

    name: str
    codes: Literal["e2m1", "e4m3", "int4"]
    scales: Literal["e8m0", "e4m3", "float32"]
    rows: int = 1  # of a block; 0: all
    columns: int = 0  # of a block; 0: all
    outer: Literal["", "multiplies", "divides"] = ""  # what the scale of the whole matrix does
    rotation: int = 0  # columns that are rotated together before they are rounded; 0: none are

    @property
    def bits(self) -> int:
        """Nominal bits of a weight."""
        return 8 if self.codes == "e4m3" else 4

    @property
    def activations(self) -> Activations | None:
        """What kernels that round both do to the inputs; None for integers, which have none."""
        if self.codes == "e2m1":
            return activations.MXFP4 if self.scales == "e8m0" else activations.NVFP4
        if self.codes == "int4":
            return None
        if self.scales == "e8m0":
            return activations.MXFP8
        return activations.FP8_BLOCKS if self.columns else activations.FP8

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> shape and dtype of a layer's tensors, which have other names in files.

        shape: of the weight, (out_features, in_features).
        """
        rows, columns = shape
        groups = ceil(columns / self.columns) if self.columns else 1
        blocks = ceil(rows / self.rows) if self.rows else 1
        codes: dict[str, tuple[tuple[int, ...], str]] = {
            "e2m1": ((rows, groups * self.columns // 2), "uint8"),
            "e4m3": ((rows, columns), "float8_e4m3fn"),
            "int4": ((rows // 2, columns), "uint8"),
        }
        parts = {"qweight": codes[self.codes], "scales": ((blocks, groups), SCALE_DTYPES[self.scales])}
        if self.outer:
            parts["outer_scale"] = ((1,), "float32")
        if self.rotation:
            parts["rotation"] = ((self.rotation, self.rotation), "float32")
        return parts

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a layer's tensors."""
        return sum(prod(size) * ITEM_BYTES[dtype] for size, dtype in self.parts(shape).values())

    def packed(self, *, column_scales: bool = False) -> PackedFormat | None:
        """The layout with kernel="packed"; None for rotated weights, whose inputs are rotated too.

        A power of two is exact in bfloat16; an E4M3 times a float32 stays both.
        """
        kinds: Mapping[str, Literal["codebook4", "float8", "affine4"]] = {
            "e2m1": "codebook4", "e4m3": "float8", "int4": "affine4",
        }  # fmt: skip
        if self.rotation:
            return None
        return PackedFormat(
            kind=kinds[self.codes], group_size=self.columns or -1, column_scales=column_scales,
            scale_dtype=PACKED_SCALES[self.scales],
            row_scales="multiply" if self.outer else "none",
        )  # fmt: skip


MXFP4 = Scheme("mxfp4", "e2m1", "e8m0", columns=32)
MXFP8 = Scheme("mxfp8", "e4m3", "e8m0", columns=32)
NVFP4 = Scheme("nvfp4", "e2m1", "e4m3", columns=16, outer="multiplies")
FP8 = Scheme("fp8", "e4m3", "float32", rows=0)
FP8_CHANNEL = Scheme("fp8-channel", "e4m3", "float32")
FP8_BLOCK = Scheme("fp8-block", "e4m3", "float32", rows=128, columns=128)
INT4 = Scheme("int4", "int4", "float32", columns=128)
MXFP4_ROTATED = Scheme("mxfp4-rotated", "e2m1", "e8m0", columns=32, outer="divides", rotation=32)
NVFP4_ROTATED = Scheme("nvfp4-rotated", "e2m1", "e4m3", columns=16, outer="divides", rotation=16)


class Layout(NamedTuple):
    """What checkpoints call the tensors of a layer, by what they are called here."""

    linear: Mapping[str, str]  # in a linear layer's module
    stacked: Mapping[str, str] = {}  # what is put to the name of a tensor of fused experts; empty: they are not read
    ignored: tuple[str, ...] = ()  # of a layer's module: what is no part of the weight


LAYOUTS: Mapping[str, Layout] = {
    "mxfp4": Layout(
        {"qweight": "weight_blocks", "scales": "weight_scales"}, {"qweight": "_blocks", "scales": "_scales"}
    ),
    "mxfp8": Layout({"qweight": "weight", "scales": "weight_scale_inv"}, {"qweight": "", "scales": "_scale_inv"}),
    "modelopt": Layout(
        {"qweight": "weight", "scales": "weight_scale", "outer_scale": "weight_scale_2",
         "column_scales": "pre_quant_scale", "input_scale": "input_scale"},
        {"qweight": "", "scales": "_weight_scale", "outer_scale": "_weight_scale_2", "input_scale": "_input_scale"},
        ignored=("k_scale", "v_scale", "q_scale"),  # of the key-value cache
    ),
    "fp_quant": Layout(
        {"qweight": "qweight", "scales": "scales", "outer_scale": "weight_global_scale",
         "rotation": "forward_hadamard_matrix", "input_scale": "act_global_scale",
         "backward_rotation": "backward_hadamard_matrix"}
    ),
}  # fmt: skip
"""quant_method -> names."""


OWN = {"compute_dtype", "skip_modules", "skip_defaults"}
"""What polyquant adds to a quantization_config."""
ALGOS: Mapping[str, Scheme] = {
    "FP8": FP8, "FP8_PER_CHANNEL_PER_TOKEN": FP8_CHANNEL, "FP8_PB_WO": FP8_BLOCK,
    "NVFP4": NVFP4, "W4A16_NVFP4": NVFP4, "MXFP8": MXFP8, "W4A16_AWQ": INT4,
}  # fmt: skip
"""ModelOpt's names of what it does to a layer -> the format of the weights."""
MIXED = "MIXED_PRECISION"
NVIDIA_READ = {
    "quant_method", "quant_algo", "group_size", "ignore", "exclude_modules", "config_groups", "kv_cache_scheme",
    "kv_cache_quant_algo", "producer", "quantized_layers", "has_zero_point", "pre_quant_scale", *OWN,
}  # fmt: skip


def skips(stored: Mapping[str, Any], dense: Any) -> dict[str, Any]:
    """Options of a stored config: what polyquant added, else the library's list of dense modules."""
    skip = stored.get("skip_modules", dense)
    return {
        "skip": tuple(skip or ()), "skip_defaults": stored.get("skip_defaults", skip is None),
        "compute_dtype": stored.get("compute_dtype", "auto"),
    }  # fmt: skip


def require_known(stored: Mapping[str, Any], known: set[str], expected: Mapping[str, tuple[object, ...]]) -> None:
    """Raises ValueError for settings that are not read, or not at these values."""
    require_read(stored, {*known, *expected})
    for name, allowed in expected.items():
        if stored.get(name) is not None and stored[name] not in allowed:
            raise ValueError(f"its {name} is {stored[name]!r}; {' or '.join(map(repr, allowed))} is read")


def modelopt_settings(stored: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Mapping[str, Any]]]:
    """(options, what is said of single layers) of a config.json, or of a hf_quant_config.json.

    Raises ValueError for settings and formats that are not read.
    """
    inner = {**stored, **stored.get("quantization", {})}
    inner.pop("quantization", None)
    require_known(inner, NVIDIA_READ, {})
    algo, layers = str(inner.get("quant_algo")), inner.get("quantized_layers") or {}
    named = {algo} if algo != MIXED else {str(each.get("quant_algo")) for each in layers.values()}
    if unread := sorted(named - set(ALGOS)) or ([] if named else [MIXED + " without quantized_layers"]):
        raise ValueError(f"its quant_algo is {', '.join(unread)}; {', '.join(ALGOS)} and {MIXED} are read")
    if inner.get("has_zero_point"):
        raise ValueError("its has_zero_point is True, and weights without zero points are read")
    dense = inner.get("ignore", inner.get("exclude_modules"))
    return {"quant_algo": algo, "group_size": inner.get("group_size"), **skips(inner, dense)}, layers


def routers(weights: Sequence[WeightInfo]) -> list[str]:
    """Modules of matrices that are neither linear layers' nor experts': the routers of mixtures."""
    experts = {module_of(weight) for weight in weights if weight.role == "experts"}
    return [module_of(each) for each in weights if each.role == "other" and module_of(each) not in experts]


def require_held(weights: Sequence[HeldWeight], scheme: Scheme) -> None:
    """Raises Misfit for weights that are no E2M1 in blocks of the format's size."""
    for weight in weights:
        if weight.table != E2M1 or weight.group_size != scheme.columns or weight.ordered:
            own = f"{weight.kind} of {weight.bits} bits in groups of {weight.group_size}"
            raise Misfit("bits", f"its codes are {own}, and E2M1 in groups of {scheme.columns} is held")
