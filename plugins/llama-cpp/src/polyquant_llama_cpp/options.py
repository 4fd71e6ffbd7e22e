"""Options of the llama.cpp backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta
from polyquant.plugin import BackendOptions, NumberFormat, RoundingMethod
from polyquant.plugin.gguf import TYPES, read_header

from polyquant_llama_cpp.formats import Quantizable, ReadOnly, bits_of, name_of, scheme_of


class LlamaCppOptions(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a GGUF holds, and how llama.cpp runs it."""

    type: Annotated[
        Quantizable | ReadOnly | Literal["file"],
        Meta(description="what to quantize a GGUF to; for a quantized one: what it holds (file: it does not say)"),
    ] = "file"
    requantize: Annotated[
        bool, Meta(description="when quantizing: accept a source below 8 bits, whose losses then add up")
    ] = False
    fallback: Annotated[
        bool, Meta(description="when quantizing: accept llama.cpp's substitute type for rows that are not whole blocks")
    ] = False
    n_ctx: Annotated[
        int, Meta(ge=0, description="tokens of context; 0: as many as the model was trained for, at most 4096")
    ] = 0
    n_batch: Annotated[int, Meta(ge=1, le=2**16, description="prompt tokens that run at once")] = 512
    n_threads: Annotated[
        int, Meta(ge=0, le=1024, description="CPU threads; 0: OMP_NUM_THREADS, else the cores this process may use")
    ] = 0
    mmap: Annotated[bool, Meta(description="map the file's weights into memory instead of reading them")] = True
    repack: Annotated[
        Literal["auto", "on", "off"],
        Meta(description="lay weights out anew for this CPU: faster, a copy beside the file; auto: on, off with AMX"),
    ] = "auto"
    flash_attention: Annotated[Literal["auto", "on", "off"], Meta(description="llama.cpp's flash attention")] = "auto"
    kv_cache_type: Annotated[
        Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"], Meta(description="type of the key-value cache")
    ] = "F16"

    load_time: ClassVar[frozenset[str]] = BackendOptions.load_time | {
        "n_ctx", "n_batch", "n_threads", "mmap", "repack", "flash_attention", "kv_cache_type",
    }  # fmt: skip

    def __post_init__(self) -> None:
        if self.compute_dtype not in ("auto", "float32"):
            raise ValueError(
                f"compute_dtype {self.compute_dtype!r} is not llama.cpp's to choose: activations are float32, and each "
                "kernel quantizes them as its block type wants; leave compute_dtype out"
            )
        if self.kv_cache_type in ("Q8_0", "Q4_0") and self.flash_attention == "off":
            raise ValueError(f"kv_cache_type {self.kv_cache_type!r} needs flash attention: leave flash_attention out")

    @property
    def number_format(self) -> NumberFormat:
        """Of the block type that the file is named after."""
        block = TYPES.get(self.scheme)
        return block.format if block else "vectors" if self.type.startswith("IQ") else "integers"

    @property
    def scheme(self) -> str:
        """The block type that the file is named after."""
        return scheme_of(self.type)

    @property
    def weight_bits(self) -> float:
        """Nominal, of the file as a whole; its tensors differ, see the layers of a loaded model."""
        return bits_of(self.type)

    @property
    def rounding_method(self) -> RoundingMethod:
        """llama.cpp fits the scales and minima of its K and IQ types to the weights."""
        return "fitted" if "_K" in self.type or self.type.startswith("IQ") else "nearest"

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """stored: {"gguf_file": path}; the type is the one the file says it has."""
        number = read_header(Path(stored["gguf_file"])).metadata.get("general.file_type")
        return msgspec.convert({"type": name_of(number)}, cls)
