"""The conformance suite, in the environment that the card pins. Floors: measured on SmolLM2-135M, beside them.

int4: 0.307, 0.688, calibrated with the packaged prose. int8 was not measured on the real model."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestAutogptq(BackendConformance):
    backend = "autogptq"
    floors: ClassVar = {"int4": Floor(kl=0.5, top1=0.60), "int8": Floor(kl=0.1, top1=0.8)}
    real_is_slow = True
