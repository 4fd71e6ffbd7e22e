"""The conformance suite. Floors: measured on SmolLM2-135M, CPU, in brackets; KL in nats."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestMxfp4(BackendConformance):
    backend = "mxfp4"
    floors: ClassVar = {"mxfp4": Floor(kl=0.8, top1=0.5)}  # 0.653, 0.581


class TestMxfp8(BackendConformance):
    backend = "mxfp8"
    floors: ClassVar = {"mxfp8": Floor(kl=0.02, top1=0.88)}  # 0.0130, 0.944


class TestNvfp4(BackendConformance):
    backend = "nvfp4"
    floors: ClassVar = {"nvfp4": Floor(kl=0.21, top1=0.67)}  # 0.162, 0.744


class TestModelOpt(BackendConformance):
    backend = "modelopt"
    floors: ClassVar = {
        "nvfp4": Floor(kl=0.21, top1=0.67),  # 0.162, 0.744
        "fp8": Floor(kl=0.02, top1=0.88),  # 0.0131, 0.956
    }


class TestFpQuant(BackendConformance):
    backend = "fp-quant"
    floors: ClassVar = {
        "nvfp4": Floor(kl=0.47, top1=0.58),  # 0.376, 0.663
        "mxfp4": Floor(kl=0.95, top1=0.48),  # 0.767, 0.562
    }
