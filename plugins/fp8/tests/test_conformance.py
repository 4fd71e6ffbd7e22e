"""The conformance suite. Floors: measured on SmolLM2-135M, CPU, in brackets; KL in nats."""

from typing import ClassVar

import polyquant
from polyquant.testing import BackendConformance, Floor

from .fp4 import write_fp4


class TestFp8(BackendConformance):
    backend = "fp8"
    floors: ClassVar = {
        "block128": Floor(kl=0.02, top1=0.88),  # 0.0131, 0.963
        "ue8m0": Floor(kl=0.02, top1=0.88),  # 0.0130, 0.944
        "tensor": Floor(kl=0.02, top1=0.90),  # 0.0132, 0.956
    }

    def make_checkpoint(self, dense, preset, out):
        """Experts in FP4 are not made here; all else is."""
        if preset in ("scheme=fp4-e2m1", "bits=4"):
            write_fp4(dense, out)
        else:
            polyquant.quantize(str(dense), self.backend, out, **self.options(preset))


class TestFbgemm(BackendConformance):
    backend = "fbgemm-fp8"
    floors: ClassVar = {"rows": Floor(kl=0.025, top1=0.88)}  # 0.0184, 0.925
