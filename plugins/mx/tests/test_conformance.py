"""The conformance suite. Floors: measured on SmolLM2-135M, CPU, in brackets; KL in nats."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestMxfp4(BackendConformance):
    backend = "mxfp4"
    floors: ClassVar = {"mxfp4": Floor(kl=2, top1=0.2)}


class TestMxfp8(BackendConformance):
    backend = "mxfp8"
    floors: ClassVar = {"mxfp8": Floor(kl=2, top1=0.2)}


class TestNvfp4(BackendConformance):
    backend = "nvfp4"
    floors: ClassVar = {"nvfp4": Floor(kl=2, top1=0.2)}


class TestModelOpt(BackendConformance):
    backend = "modelopt"
    floors: ClassVar = {"nvfp4": Floor(kl=2, top1=0.2), "fp8": Floor(kl=2, top1=0.2)}


class TestFpQuant(BackendConformance):
    backend = "fp-quant"
    floors: ClassVar = {"nvfp4": Floor(kl=2, top1=0.2), "mxfp4": Floor(kl=2, top1=0.2)}
