"""The conformance suite. Floors: measured on SmolLM2-135M, bitsandbytes 0.50.2, CPU, in brackets; KL in nats."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestBitsAndBytes(BackendConformance):
    backend = "bitsandbytes"
    floors: ClassVar = {
        "nf4": Floor(kl=0.35, top1=0.70),  # 0.227, 0.775
        "nf4-dq": Floor(kl=0.35, top1=0.70),  # 0.231, 0.775
        "fp4": Floor(kl=0.51, top1=0.58),  # 0.400, 0.650
        "int8": Floor(kl=0.025, top1=0.87),  # 0.017, 0.919
    }
