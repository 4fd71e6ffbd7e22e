"""The conformance suite, in the environment that the card pins. Floors: measured on SmolLM2-135M, in brackets."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestAutoawq(BackendConformance):
    backend = "autoawq"
    floors: ClassVar = {"int4": Floor(kl=0.15, top1=0.80)}
    real_is_slow = True
