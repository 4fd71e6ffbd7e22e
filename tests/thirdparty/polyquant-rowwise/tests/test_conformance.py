"""The conformance suite, run over both presets."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestRowwise(BackendConformance):
    backend = "rowwise"
    floors: ClassVar = {"int8": Floor(kl=0.005, top1=0.95), "int8-bf16-scales": Floor(kl=0.005, top1=0.95)}
