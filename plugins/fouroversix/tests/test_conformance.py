"""The conformance suite. Floors: measured on SmolLM2-135M, fouroversix 1.0.5, CPU, in brackets; KL in nats."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestFouroversix(BackendConformance):
    backend = "fouroversix"
    floors: ClassVar = {
        "nvfp4": Floor(kl=0.40, top1=0.62),  # 0.314, 0.694
        "if4": Floor(kl=0.37, top1=0.64),  # 0.287, 0.719
        "mxfp4": Floor(kl=1.40, top1=0.38),  # 1.092, 0.450
    }
