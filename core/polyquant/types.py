"""The records that travel between core and plugins: frozen, typed, JSON through msgspec, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, gcd, lcm, prod
from typing import ClassVar, Literal

import msgspec

from polyquant.options import BackendOptions, Dtype

DeviceMap = Mapping[str, int | str]
Role = Literal[
    "linear", "experts", "embedding", "head", "convolution", "custom", "vector", "buffer", "adapter", "tower", "other"
]  # fmt: skip
_BYTES = {8: ("float64", "int64"), 4: ("float32", "int32"), 2: ("bfloat16", "float16"), 1: ("int8", "uint8", "bool")}
DTYPE_BYTES = {name: size for size, names in _BYTES.items() for name in names}
"""Bytes of an element of a dense tensor, by the name of its dtype."""


UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for text that is no JSON, or not the JSON that was expected."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all records."""

    def to_json(self) -> str:
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()


class Problem(Record, frozen=True):
    """One thing that stops a backend on this machine."""

    what: str  # what is wrong and what is there, one sentence
    fix: str  # the command or option that fixes it
    kind: Literal["missing", "version", "import", "native", "device", "other"] = "other"
    detail: str = ""  # the library's own words, such as a traceback


class DeviceSupport(Record, frozen=True):
    """A device type a backend runs on."""

    type: str  # torch's device type: cpu, cuda, xpu, mps, ...
    minimum_capability: tuple[int, int] | None = None  # CUDA compute capability

    def __str__(self) -> str:
        least = self.minimum_capability
        return f"{self.type} (compute capability {least[0]}.{least[1]} and up)" if least else self.type


class Library(Record, frozen=True):
    """A distribution that a backend stands on, with the versions it was tested with."""

    distribution: str  # as pip names it
    versions: str = ""  # PEP 440 specifier; empty: any
    module: str = ""  # import name where it differs from the distribution's
    caution: str = ""  # what one should know before installing it, such as what it does not live with

    @property
    def requirement(self) -> str:
        """What to give pip: `bitsandbytes>=0.49,<0.51`."""
        return self.distribution + self.versions


class Capabilities(Record, frozen=True):
    """What a backend can do. Each entry is a promise that the conformance suite runs."""

    bits: tuple[int | float, ...]  # whole ones stay whole when a card is read from JSON
    schemes: tuple[str, ...]
    devices: tuple[DeviceSupport, ...]
    on_the_fly: bool = False  # quantizes a dense checkpoint while loading
    needs_calibration: bool = False  # quantizing needs sample text
    loads_prequantized: tuple[str, ...] = ()  # the quant_method names it reads
    saves: bool = False  # writes a checkpoint that loads back bit for bit
    readable_by: tuple[str, ...] = ()  # who else reads what it writes: "transformers", or a runtime; others refuse it
    trains: bool = False  # adapters train on its frozen base
    compiles: bool = False  # torch.compile works
    offloads: bool = False  # part of the model may live on a slower device
    runtime: str = "torch"  # what runs the model; "torch": loaded.model is a torch.nn.Module here
    makes_from: Literal["dense", "gguf"] = "dense"  # what its quantize hook takes

    @property
    def runs_on_torch(self) -> bool:
        """Whether a loaded model is a torch.nn.Module of this process."""
        return self.runtime == "torch"


class Isolated(Record, frozen=True):
    """What a backend that cannot share an environment needs in one of its own; `polyquant env create` makes it."""

    reason: str  # why it cannot share one
    requirements: tuple[str, ...] = ()  # exact pins, as pip takes them
    without_dependencies: tuple[str, ...] = ()  # installed after these, alone: their own metadata asks for too much
    variables: Mapping[str, str] = {}  # environment variables that its processes need


class Mark(Record, frozen=True):
    """What tells a checkpoint of a method where its quantization_config names no quant_method, or there is none.

    A file beside config.json, or an object in it, says how the checkpoint is quantized. Tensors and metadata do not:
    they say what to look for, and are looked for where the rest is there.
    """

    method: str  # the quant_method that it stands for
    file: str = ""  # beside config.json: it holds the quantization config
    key: str = ""  # of config.json: the object under it is the quantization config,
    fields: tuple[str, ...] = ()  # where that has all of these
    tensors: tuple[str, ...] = ()  # that a packed layer has: last words of their names, "weight:uint32" with the dtype
    metadata: Mapping[str, str] = {}  # of the safetensors files that have these tensors; "": whatever it says
    names: Mapping[str, str] = {}  # of tensors: a regular expression -> what takes its place in the model's names

    @property
    def headers(self) -> bool:
        """Whether it says anything of safetensors headers."""
        return bool(self.tensors or self.metadata)


class BackendInfo(Record, frozen=True):
    """A backend's card."""

    name: str
    summary: str
    capabilities: Capabilities
    options: type[BackendOptions]
    docs: str  # address
    libraries: tuple[Library, ...] = ()
    presets: Mapping[str, Mapping[str, object]] = {}  # name -> options; the first is the default choice
    marks: tuple[Mark, ...] = ()  # of checkpoints that it reads, beside their quant_method; asked of backends that the
    # catalogue has, installed or not: whoever writes a format of their own names it in quantization_config
    also_called: tuple[str, ...] = ()  # what libraries and transformers call it: users who ask for these are led here
    measured_kl: Mapping[str, float] = {}  # preset -> mean KL to the dense SmolLM2-135M-Instruct, nats a position;
    # a preset of whose type that model's own weights were is left out: the figure, 0, says nothing of other models
    compute_dtypes: Mapping[str, Dtype] = {}  # device type -> measured best; cuda left out: by compute capability
    isolated: Isolated | None = None  # where `libraries` are not here, the backend runs in an environment of its own


Stacked = Literal["", "out_in", "in_out"]
"""How the experts of a layer lie in one tensor: (experts, out_features, in_features), or the last two the other way
round. Empty: it holds none, or none that transformers' interface for experts multiplies with."""


class WeightInfo(Record, frozen=True):
    """One tensor of a model before quantization, as the architecture defines it."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype | str
    role: Role
    module: str  # class name of the module that owns it
    tied_to: str = ""  # the tensor it shares its storage with; it then counts no bytes
    default_skip: bool = False  # kept dense unless skip_defaults=False
    parts: Mapping[str, str] = {}  # of a packed checkpoint's layer: what the file holds of it -> dtype, {"scales": ...}
    stacked: Stacked = ""  # of experts: which way each lies in the tensor; empty: none that can be multiplied alone

    @property
    def as_linear(self) -> tuple[int, ...]:
        """A matrix as a linear layer has it, (out_features, in_features): transformers' Conv1D is turned."""
        return self.shape[::-1] if self.module == "Conv1D" else self.shape


PackedKind = Literal["affine4", "codebook4", "int8", "float8"]
"""affine4: codes from 0 to 15, scale * (code - zero) or scale * code + minimum. codebook4: scale * table[code].
int8: as affine4, with signed codes of 8 bits. float8: scale * a float of 8 bits (E4M3)."""
PackedOffsets = Literal["none", "zeros", "minima"]
"""Of the groups. none: one zero point for all. zeros: an int8 zero point each. minima: a float32 minimum each."""


class PackedFormat(Record, frozen=True):
    """The layout of a layer's weights in the packed runtime: see `polyquant.packed_weights.weight`."""

    kind: PackedKind
    group_size: int  # columns that share a scale; -1: all of them
    scale_dtype: Literal["float32", "float16", "bfloat16", "int8", "float8_e4m3fn"] = "float16"
    offsets: PackedOffsets = "none"
    ordered: bool = False  # whether columns are sorted by their groups: act-order
    outer_group: int = 0  # of int8 scales and minima: columns that share the float16 scale of these; else 0
    column_scales: bool = False  # whether each column has a float32 scale besides, as SINQ's have
    row_scales: Literal["none", "multiply", "divide"] = "none"  # what a float32 of each row does to scales of 8 bits

    ROWS: ClassVar[int] = 8  # that are interleaved
    COLUMNS: ClassVar[int] = 32  # what those stored are a multiple of
    LEAST_GROUP: ClassVar[int] = 16  # columns; every group is a multiple of it
    TABLE_BYTES: ClassVar[int] = 16 * 4
    CODE_BITS: ClassVar[Mapping[str, int]] = {"affine4": 4, "codebook4": 4, "int8": 8, "float8": 8}

    @property
    def holds_groups(self) -> bool:
        """Whether groups of this size have a place in the layout."""
        return self.group_size == -1 or self.group_size % self.LEAST_GROUP == 0

    def fitted(self, columns: int) -> PackedFormat:
        """The layout of so many columns: in parts of groups that do not divide them, where nothing is then padded."""
        part = gcd(columns, self.group_size)
        whole = self.group_size in (-1, part)
        if whole or self.ordered or self.outer_group or part % self.LEAST_GROUP or columns % self.COLUMNS:
            return self
        return msgspec.structs.replace(self, group_size=part)

    def padded(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The rows and columns that are stored, of a weight (out_features, in_features)."""
        rows, columns = shape
        size = self.fitted(columns).group_size
        whole = self.COLUMNS if size == -1 else lcm(self.COLUMNS, size)
        return self.ROWS * ceil(rows / self.ROWS), whole * ceil(columns / whole)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight (out_features, in_features) with scales of all kinds, offsets, table and order."""
        rows, columns = self.padded(shape)
        groups = rows * (columns // self.fitted(shape[1]).group_of(columns))
        minimum = 1 if self.outer_group else 4
        each = DTYPE_BYTES.get(self.scale_dtype, 1) + {"none": 0, "zeros": 1, "minima": minimum}[self.offsets]
        outer_each = 2 * (2 if self.offsets == "minima" else 1)  # float16
        outer = rows * columns // self.outer_group * outer_each if self.outer_group else 0
        codes = rows * columns * self.CODE_BITS[self.kind] // 8
        table = self.TABLE_BYTES if self.kind == "codebook4" else 0
        of_rows = 4 * rows if self.row_scales != "none" else 0
        return codes + groups * each + of_rows + outer + table + 4 * columns * (self.ordered + self.column_scales)

    def group_of(self, columns: int) -> int:
        """Columns that share a scale, of so many that are stored."""
        return columns if self.group_size == -1 else self.group_size


class HeldWeight(Record, frozen=True):
    """What a packed weight is, as far as another format has to have a place for it."""

    name: str  # of the module
    shape: tuple[int, int]  # out_features, in_features
    kind: Literal["integers", "floats", "code book"]  # what codes are: floats are E4M3
    bits: int  # of a code: 4 or 8
    group_size: int  # columns that share a scale; in_features: all of them
    scale_dtype: Literal["float32", "float16", "bfloat16"]
    zero_points: Literal["middle", "whole", "none"] = "middle"
    """Of integers. middle: all in the middle of the codes' range. whole: others, integers. none: minima that are no
    multiples of the scales."""
    ordered: bool = False  # whether columns belong to groups in an order of their own: act-order
    table: tuple[float, ...] = ()  # of a code book

    @property
    def columns_of_a_scale(self) -> int:
        """`group_size`, -1 for all of a row."""
        return -1 if self.group_size == self.shape[1] else self.group_size


class LayerPlan(Record, frozen=True):
    """What a tensor is going to be."""

    name: str
    shape: tuple[int, ...]
    role: Role
    stored_bytes: int  # with scales, zero points and constants
    bits: float
    scheme: str
    quantized: bool
    reason: str = ""  # why it stays dense
    packed: PackedFormat | None = None  # its layout with kernel="packed"; None: it has none there


class LayerInfo(Record, frozen=True):
    """What a tensor is: one record for every parameter and buffer of a loaded model."""

    name: str  # of the tensor, such as model.layers.0.mlp.up_proj.weight
    shape: tuple[int, ...]  # logical: of the weight, not of its packed form
    role: Role
    bits: float  # nominal, such as 4
    scheme: str  # such as nf4; for a dense tensor its dtype
    stored_bytes: int  # all storage it owns: packed weight, scales, zero points, codes
    parts: Mapping[str, int]  # attribute -> bytes; sums to stored_bytes
    device: str
    quantized: bool
    kernel: str = ""  # what multiplies with it, where it is quantized
    reason: str = ""  # why it is dense

    @property
    def weights(self) -> int:
        """Number of logical elements."""
        return prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, constants included, for each logical element."""
        return 8 * self.stored_bytes / self.weights if self.weights else 0.0


class HookRecord(Record, frozen=True):
    """One addressed hook call, as the observers saw it."""

    backend: str
    hook: str
    seconds: float
    peak_bytes: int | None  # resident set (CPU) or allocator (CUDA) peak during the call; None: could not be measured
    device: str
    failed: bool = False
    held_bytes: int | None = None  # what was held when the call began, of the same kind as peak_bytes
