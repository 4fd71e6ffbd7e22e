"""Options of backends whose weights have a place in polyquant's packed layout, and what comes there with them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from polyquant.options import BackendOptions

AUTO, PACKED, LIBRARY, KEEP, HALF, QUANTIZE = "auto", "packed", "library", "keep", "16bit", "quantize"
VocabularyBits = Literal["auto", "keep", "16bit", "8bit", "4bit"]
"""Of an embedding or an output head. keep: dense in the compute dtype, or quantized as its checkpoint has it. 16bit:
dense, as the checkpoint holds it in bfloat16 or float16, else rounded to float16. auto: 16bit beside packed weights."""


class PackableOptions(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a backend whose weights have a place in polyquant's packed layout."""

    kernel: Annotated[
        Literal["auto", "packed", "library"],
        Meta(
            description="what multiplies: packed: polyquant's own layout and kernels, on a CPU; library: the backend's "
            "library; auto: packed where polyquant-kernels is installed and weights have a place there, in float32, at "
            "most a fifth more memory"
        ),
    ] = "auto"
    embeddings: Annotated[
        VocabularyBits,
        Meta(
            description="bits of the input embedding, and of an output head tied to it, on a CPU; keep: as they are, "
            "in the compute dtype; auto: 16bit beside packed weights, else keep"
        ),
    ] = "auto"
    head: Annotated[VocabularyBits, Meta(description="bits of an output head that is not tied, as embeddings")] = "auto"

    load_time: ClassVar[frozenset[str]] = BackendOptions.load_time | {"kernel", "embeddings", "head"}
    quantizes_vocabulary: ClassVar[bool] = False
    """Whether the format has embedding and head in few bits of its own accord: there is then no preset `small`."""


class ExpertsOptions(PackableOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a backend that rounds a linear layer as it is handed over: with the hook `quantize_linear`."""

    experts: Annotated[
        Literal["auto", "keep", "quantize"],
        Meta(description="fused experts of a mixture: keep: as the library leaves them, dense; quantize: as linear "
             "layers, in polyquant's packed layout, on a CPU; auto: quantize with kernel='packed'"),
    ] = "auto"  # fmt: skip

    load_time: ClassVar[frozenset[str]] = PackableOptions.load_time | {"experts"}


def is_packed(options: BackendOptions) -> bool:
    """Whether the packed runtime multiplies with a backend's weights with these options."""
    return getattr(options, "kernel", "") == PACKED


def packs_any(options: BackendOptions) -> bool:
    """Whether anything is held otherwise than the library has it: weights, an embedding, a head, experts."""
    vocabulary = any(getattr(options, name, KEEP) not in (AUTO, KEEP) for name in ("embeddings", "head"))
    return is_packed(options) or vocabulary or quantizes_experts(options)


def quantizes_experts(options: BackendOptions) -> bool:
    """Whether fused experts are quantized with these options, where a model has some that can be."""
    asked = getattr(options, "experts", KEEP)
    return asked == QUANTIZE or (asked == AUTO and is_packed(options))
