"""The conformance suite. Floors: measured on SmolLM2-135M, hqq 0.2.8.post1, CPU, in brackets; KL in nats."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestHqq(BackendConformance):
    backend = "hqq"
    floors: ClassVar = {
        "int4": Floor(kl=0.26, top1=0.68),  # 0.176, 0.756
        "int8": Floor(kl=0.003, top1=0.95),  # 0.0008, 0.988
        "int3": Floor(kl=3.0, top1=0.20),  # 2.30, 0.281; a model of this size does not stand 3 bit
    }
    real_is_slow = True
