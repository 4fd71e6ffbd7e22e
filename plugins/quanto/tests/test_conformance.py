"""The conformance suite. Floors: measured on SmolLM2-135M, optimum-quanto 0.2.7, CPU, in brackets; KL in nats."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestQuanto(BackendConformance):
    backend = "quanto"
    real_is_slow = True
    floors: ClassVar = {
        "int8": Floor(kl=0.006, top1=0.94),  # 0.0030, 0.981
        "int4": Floor(kl=0.6, top1=0.62),  # 0.433, 0.706
        "float8": Floor(kl=0.03, top1=0.87),  # 0.0184, 0.925
    }
