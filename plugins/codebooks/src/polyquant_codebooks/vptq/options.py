"""Options of VPTQ checkpoints, which have them for each layer. Format: vptq.layers.vqlinear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, log2
from typing import Annotated, Any, ClassVar, Self

import msgspec
from msgspec import Meta

from polyquant_codebooks.options import CodebookOptions, Layout, common, require_known

UNUSED = {"in_features", "out_features", "bias", "indices_as_float", "is_indice_packed", "vector_quant_dim"}
"""What a layer's settings repeat, or have one value of."""
ONE_VALUE = {"is_indice_packed": True, "indices_as_float": False, "vector_quant_dim": "out"}
NORM = ("weight_scale", "weight_bias")


class VptqLayer(msgspec.Struct, frozen=True, kw_only=True):
    """A layer's settings, as its checkpoint has them; of pairs the first is of the outliers."""

    vector_lens: tuple[int, int]  # rows of a vector
    num_centroids: tuple[int, int]
    num_res_centroids: tuple[int, int]  # of a second table, whose vectors are added; -1: there is none
    group_num: int  # groups of columns, with tables of their own
    group_size: int  # columns of one
    outlier_size: int = 0  # columns before them, with a table for all
    enable_norm: bool = False
    enable_perm: bool = False

    @property
    def index_bits(self) -> int:
        """Bits of an index into the main table."""
        return ceil(log2(self.num_centroids[1]))

    @property
    def residual_bits(self) -> int:
        """Bits of an index into the second table; 0 where there is none."""
        return ceil(log2(self.num_res_centroids[1])) if self.num_res_centroids[1] > 0 else 0

    @property
    def has_outliers(self) -> bool:
        """Whether the first columns have a table of their own."""
        return self.vector_lens[0] > 1 and self.num_centroids[0] > 0 and self.outlier_size > 0

    def require_sound(self) -> None:
        """Raises ValueError for settings that no layer has."""
        if self.num_centroids[1] < 2 or self.vector_lens[1] < 1 or self.group_num < 1 or self.group_size < 1:
            raise ValueError("has no table of vectors")
        if self.num_res_centroids[0] > 0:
            raise ValueError("has a second table of its outliers, which no reader knows")
        if self.residual_bits > self.index_bits:
            raise ValueError("has a second table that is larger than the first, which vptq itself reads wrong")
        if self.index_bits + self.residual_bits > 32:
            raise ValueError("has indices of more than 32 bits")


class VptqOptions(CodebookOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Vectors of rows of a column are entries of learned tables, a second one's added. Read from checkpoints only."""

    mark: ClassVar[str] = "indices"
    inside: ClassVar[tuple[str, ...]] = ("centroids", "res_centroids", "outlier_centroids")

    layers: Annotated[
        tuple[tuple[str, VptqLayer], ...],
        Meta(description="settings of each layer, by its name or by the last part of that; a checkpoint brings them"),
    ] = ()

    @property
    def weight_bits(self) -> float:
        """Of most layers; 2 where none is known."""
        bits = [_bits(layer) for _, layer in self.layers]
        return max(sorted(set(bits)), key=bits.count) if bits else 2

    @property
    def scheme(self) -> str:
        """vptq."""
        return "vptq"

    def bits_of(self, name: str) -> float:
        return _bits(self.of_module(name))

    def of_module(self, name: str) -> VptqLayer:
        """The settings of a module. Raises ValueError where there are none."""
        known = dict(self.layers)
        found = known.get(name) or known.get(name.rpartition(".")[2])
        if found is None:
            raise ValueError("its quantization_config has no settings for this layer (config_for_layers)")
        found.require_sound()
        return found

    def layout(self, name: str, shape: Sequence[int]) -> Layout:
        (rows, columns), own = shape, self.of_module(name)
        outliers = own.outlier_size if own.has_outliers else 0
        if own.group_num * own.group_size + outliers != columns:
            raise ValueError(
                f"{own.group_num} groups of {own.group_size} columns and {outliers} outliers are not its {columns}"
            )
        length, count = own.vector_lens[1], own.num_centroids[1]
        words = ceil(own.group_size * (own.index_bits + own.residual_bits) / 32)
        tensors: dict[str, tuple[tuple[int, ...], str]] = {
            "centroids.weight": ((own.group_num, count * length), "float16"),
            "indices": ((own.group_num, ceil(rows / length), words), "int32"),
        }
        if own.residual_bits:
            tensors["res_centroids.weight"] = ((own.group_num, own.num_res_centroids[1] * length), "float16")
        if outliers:
            long = own.vector_lens[0]
            tensors["outlier_centroids.weight"] = ((1, own.num_centroids[0] * long), "float16")
            tensors["outlier_indices"] = ((1, ceil(rows / long), outliers), "int16")
        if own.enable_perm:
            tensors["perm"] = ((columns,), "int16")
        if own.enable_norm:
            tensors |= dict.fromkeys(NORM, ((columns,), "float16"))
        return tensors

    def to_stored(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint: transformers' VptqConfig, and what polyquant adds."""
        own = {name: {**msgspec.to_builtins(layer), "is_indice_packed": True, "indices_as_float": False}
               for name, layer in self.layers}  # fmt: skip
        return {
            "quant_method": "vptq", "config_for_layers": {name: layer for name, layer in own.items() if "." in name},
            "shared_layer_config": {name: layer for name, layer in own.items() if "." not in name},
            "modules_to_not_convert": self.stored_skip, "compute_dtype": self.compute_dtype,
        }  # fmt: skip

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        require_known(stored, "config_for_layers", "shared_layer_config", "enable_proxy_error")
        layers = {**(stored.get("shared_layer_config") or {}), **(stored.get("config_for_layers") or {})}
        for name, own in layers.items():
            for setting, value in ONE_VALUE.items():
                if own.get(setting, value) != value:
                    raise ValueError(f"{setting} of {name} is {own[setting]!r}; {value!r} is read")
            if unread := sorted(set(own) - UNUSED - set(VptqLayer.__struct_fields__)):
                raise ValueError(f"{name} has {', '.join(unread)}, which is not read")
        pairs = [
            (name, {key: value for key, value in own.items() if key not in UNUSED})
            for name, own in sorted(layers.items())
        ]
        return msgspec.convert({"layers": pairs} | common(stored), cls)


def _bits(layer: VptqLayer) -> float:
    """Bits of indices for each weight, as a whole number."""
    return max(1, round((layer.index_bits + layer.residual_bits) / layer.vector_lens[1]))
