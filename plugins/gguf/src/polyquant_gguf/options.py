"""Options of the GGUF backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.errors import Misfit
from polyquant.plugin import (
    E2M1,
    BackendOptions,
    HeldWeight,
    LayerFormats,
    MixableOptions,
    NumberFormat,
    PackableOptions,
)
from polyquant.plugin.gguf import TYPES, read_header
from polyquant.plugin.layouts import size_held

OPTIONS_KEY = "polyquant.options"  # metadata of a GGUF that polyquant wrote: the options it was made with, as JSON
Quantizable = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
"""The types the gguf package quantizes to; the others only llama.cpp does."""


class GgufOptions(MixableOptions, PackableOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A block type for a dense checkpoint; for a GGUF file `type` is 'file': each tensor keeps its own."""

    type: Annotated[
        Quantizable | Literal["file"],
        Meta(description="block type of quantized weights; file: what the GGUF holds, tensor by tensor"),
    ] = "Q4_0"
    embedding_type: Annotated[
        Quantizable | Literal["dense", "file"] | None,
        Meta(description="block type of the embedding and of an output head tied to it; dense where left out"),
    ] = None
    layers: Annotated[
        LayerFormats[Quantizable],
        Meta(
            description="layers with a block type of their own (embedding, head, experts too), by patterns as in skip"
        ),
    ] = ()
    file: Annotated[str, Meta(description="the GGUF whose types apply; filled in when one is loaded")] = ""

    split_mib: Annotated[
        int,
        Meta(ge=0, description="most MiB of tensors in a file that is written, which then are several; 0: one file"),
    ] = 0

    load_time: ClassVar[frozenset[str]] = PackableOptions.load_time | {"split_mib"}
    format_options: ClassVar[tuple[str, ...]] = ("type", "embedding_type")
    mixes: ClassVar[tuple[str, ...]] = (*MixableOptions.mixes, "experts")
    takes_experts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.embedding_type is None:
            msgspec.structs.force_setattr(self, "embedding_type", "file" if self.type == "file" else "dense")
        if (self.type == "file") != (self.embedding_type == "file"):
            raise ValueError(
                "a GGUF's types come with its file, for all tensors: type and embedding_type are both 'file'"
            )
        if self.layers and self.type == "file":
            raise ValueError("a GGUF's types come with its file: layers are for a dense checkpoint")
        if self.file and self.type != "file":
            raise ValueError("file belongs to type 'file'")

    @property
    def number_format(self) -> NumberFormat:
        """Of the type; a file has its own for each tensor, which this does not tell apart."""
        return TYPES[self.type].format if self.type != "file" else "integers"

    @property
    def scheme(self) -> str:
        """The type; of a file each tensor has its own."""
        return "" if self.type == "file" else self.type

    @property
    def weight_bits(self) -> float:
        """Of the type; for a file, of the type that most of its weights have."""
        if self.type != "file":
            return TYPES[self.type].bits
        if not self.file:
            return 0.0
        sizes: dict[float, int] = {}
        for entry in read_header(Path(self.file)).tensors.values():
            if len(entry.shape) > 1:
                sizes[entry.type.bits] = sizes.get(entry.type.bits, 0) + entry.nbytes // entry.type.nbytes
        return max(sizes, key=lambda bits: sizes[bits], default=0.0)

    def to_stored(self) -> dict[str, Any]:
        """What the loaded model's config carries as `quantization_config`."""
        return {"quant_method": "gguf", **self.to_written()}

    def to_written(self) -> dict[str, Any]:
        """What a file that polyquant writes holds of them: all but what its reader chooses, such as the kernel."""
        chosen = self.load_time - BackendOptions.load_time
        return {name: value for name, value in msgspec.to_builtins(self).items() if name not in chosen}

    @classmethod
    def holding(cls, weights: Sequence[HeldWeight]) -> dict[str, Any]:
        """The type of most layers; the others have their own."""
        own = {weight.name: _held(weight) for weight in weights}
        size_held(weights, (32,))
        (most, _), *_ = Counter(own.values()).most_common(1)
        others = tuple((name, chosen) for name, chosen in own.items() if chosen != most)
        return {"type": most, **({"layers": others} if others else {})}

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """stored: {"gguf_file": its path} for a GGUF file, or what `to_stored` gives.

        A file that polyquant wrote holds the options it was made with; any other has the type 'file'.
        """
        own = {name: value for name, value in stored.items() if name not in ("quant_method", "gguf_file")}
        try:
            if path := stored.get("gguf_file"):
                written = read_header(Path(path)).metadata.get(OPTIONS_KEY)
                if written is None:
                    return cls(type="file", file=str(path))
                own = msgspec.json.decode(written)
                if own.get("type", "file") == "file":
                    raise ValueError(f"its {OPTIONS_KEY} name no type")
            return msgspec.convert({"type": "file", **own}, cls)
        except (msgspec.MsgspecError, AttributeError) as error:
            raise ValueError(f"unreadable {OPTIONS_KEY}: {error}") from error


def _held(weight: HeldWeight) -> Quantizable:
    """The block type that holds a weight as it is. Raises Misfit."""
    if weight.ordered:
        raise Misfit("act-order", "its columns belong to groups in an order of their own, and those of blocks follow")
    symmetric = weight.zero_points == "middle"
    if weight.kind == "integers" and weight.bits == 4:
        return "Q4_0" if symmetric else "Q4_1"
    if weight.kind == "integers" and not symmetric:
        raise Misfit("zero points", "its codes of 8 bits have fitted zero points, and those of Q8_0 have none")
    if weight.kind == "integers":
        return "Q8_0"
    if weight.table != E2M1:
        raise Misfit("bits", f"its codes are {weight.kind} of {weight.bits} bits, and integers or E2M1 are held")
    return "MXFP4"
