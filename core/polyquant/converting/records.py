"""What a conversion came to."""

from __future__ import annotations

from typing import Any

from polyquant.types import Record


class ConvertedLayer(Record, frozen=True):
    """One layer, as the target's own reader reads it back, beside what it was."""

    name: str  # of the module, or of the tensor of fused experts
    shape: tuple[int, int]  # out_features, in_features; of experts, those of one
    scheme: str  # what the source calls its weights
    largest_difference: float  # between two weights, in float32; 0: bit-equal
    largest_weight: float  # of the source, which the difference is to be seen beside

    @property
    def exact(self) -> bool:
        """Whether all weights are bit-equal in float32."""
        return self.largest_difference == 0.0


class Conversion(Record, frozen=True):
    """A checkpoint that was converted, proven by reading it back."""

    source: str
    source_backend: str
    target_backend: str
    options: dict[str, Any]  # of the target, as they are stored
    out: str
    checkpoint_bytes: int
    layers: tuple[ConvertedLayer, ...] = ()
    requantized: bool = False  # rounded again, because the target had no place for the weights as they are
    kl_mean: float | None = None  # of a requantized one: to the source, nats a position
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether all weights of all layers are bit-equal in float32."""
        return not self.requantized and all(layer.exact for layer in self.layers)

    @property
    def largest_relative_difference(self) -> float:
        """The largest difference of a layer's weights, beside its largest weight."""
        return max((layer.largest_difference / (layer.largest_weight or 1.0) for layer in self.layers), default=0.0)
