"""The conformance suite. Floors: measured on SmolLM2-135M, gptqmodel 7.7.0, CPU, in brackets; KL in nats."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestAwq(BackendConformance):
    backend = "awq"
    floors: ClassVar = {"int4": Floor(kl=0.15, top1=0.80)}  # 0.104, 0.863
    real_is_slow = True
