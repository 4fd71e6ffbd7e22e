"""The conformance suite. Floors: measured on SmolLM2-135M, CPU, in brackets; KL in nats."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestFp8(BackendConformance):
    backend = "fp8"
    floors: ClassVar = {
        "block128": Floor(kl=0.02, top1=0.88),  # 0.0131, 0.963
        "ue8m0": Floor(kl=0.02, top1=0.88),  # 0.0130, 0.944
        "tensor": Floor(kl=0.02, top1=0.90),  # 0.0132, 0.956
    }


class TestFbgemm(BackendConformance):
    backend = "fbgemm-fp8"
    floors: ClassVar = {"rows": Floor(kl=0.02, top1=0.88)}
