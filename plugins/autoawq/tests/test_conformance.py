"""The conformance suite, in the environment that the card pins. Floors: measured on SmolLM2-135M, in brackets."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestAutoawq(BackendConformance):
    backend = "autoawq"
    floors: ClassVar = {"int4": Floor(kl=0.25, top1=0.70)}  # 0.124, 0.794, calibrated with the packaged prose
    real_is_slow = True
