"""The conformance suite. Floors: measured on SmolLM2-135M, gptqmodel 7.7.0, CPU, in brackets; KL in nats."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestAwq(BackendConformance):
    backend = "awq"
    floors: ClassVar = {}
    real_is_slow = True
