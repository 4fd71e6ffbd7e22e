"""The conformance suite. Floors: measured on SmolLM2-135M, sinq 0.2.0, CPU, in brackets; KL in nats."""

import os
from typing import ClassVar

os.environ["SINQ_AUTO_PATCH"] = "0"  # of the suite's fresh processes: else sinq's sitecustomize imports torch in each

from polyquant.testing import BackendConformance, Floor


class TestSinq(BackendConformance):
    backend = "sinq"
    floors: ClassVar = {
        "int4": Floor(kl=0.33, top1=0.72),  # 0.221, 0.806
        "int8": Floor(kl=0.005, top1=0.95),  # 0.0014, 0.981
    }
    real_is_slow = True
