"""The conformance suite. Floors: measured on SmolLM2-135M, gptqmodel 7.7.0, CPU, in brackets; KL in nats."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestGptq(BackendConformance):
    backend = "gptq"
    floors: ClassVar = {
        "int4": Floor(kl=0.30, top1=0.70),  # 0.224, 0.775
        "int8": Floor(kl=0.004, top1=0.93),  # 0.0015, 0.969
        "int4-act-order": Floor(kl=0.30, top1=0.63),  # 0.210, 0.712
    }
    real_is_slow = True


class TestAwq(BackendConformance):
    backend = "awq"
    floors: ClassVar = {"int4": Floor(kl=0.15, top1=0.80)}  # 0.104, 0.863
    real_is_slow = True
