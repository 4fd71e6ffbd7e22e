"""The conformance suite. Floors: measured on SmolLM2-135M, CPU, in brackets; KL in nats."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestEetq(BackendConformance):
    backend = "eetq"
    floors: ClassVar = {"int8": Floor(kl=0.02, top1=0.9)}


class TestGemma(BackendConformance):
    backend = "gemma"
    floors: ClassVar = {"int8": Floor(kl=0.02, top1=0.9), "int4": Floor(kl=8.0, top1=0.0)}
