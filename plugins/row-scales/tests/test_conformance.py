"""The conformance suite. Floors: measured on SmolLM2-135M, CPU, in brackets; KL in nats."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestEetq(BackendConformance):
    backend = "eetq"
    floors: ClassVar = {"int8": Floor(kl=0.006, top1=0.96)}  # 0.0031, 0.994


class TestGemma(BackendConformance):
    backend = "gemma"
    floors: ClassVar = {
        "int8": Floor(kl=0.006, top1=0.95),  # 0.0030, 0.981
        "int4": Floor(kl=1.1, top1=0.45),  # 0.797, 0.550
    }
