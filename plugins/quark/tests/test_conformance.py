"""The conformance suite. Floors: measured on SmolLM2-135M, amd-quark 0.13, CPU, in brackets; KL in nats."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestQuark(BackendConformance):
    backend = "quark"
    floors: ClassVar = {
        "int4": Floor(kl=0.5, top1=0.62),  # 0.383, 0.688
        "int8": Floor(kl=0.006, top1=0.93),  # 0.0030, 0.969
        "fp8": Floor(kl=0.03, top1=0.88),  # 0.0184, 0.925
        "mxfp4": Floor(kl=0.62, top1=0.57),  # 0.485, 0.637
    }
    real_is_slow = True
