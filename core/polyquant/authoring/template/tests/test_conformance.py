"""The conformance suite: every promise of the card, for every preset. `polyquant check-backend rowwise` runs the same."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestRowwise(BackendConformance):
    backend = "rowwise"
    # Replace: how close each preset stays to the dense model; without a floor the test says what it measured.
    floors: ClassVar = {"int8": Floor(kl=0.005, top1=0.95), "int8-bf16-scales": Floor(kl=0.005, top1=0.95)}
