"""The promises of the card, kept. Floors: measured on SmolLM2-135M, CPU, in brackets; KL in nats."""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestMlx(BackendConformance):
    backend = "mlx"
    floors: ClassVar = {
        "int4": Floor(kl=0.5, top1=0.5),
        "int8": Floor(kl=0.5, top1=0.5),
        "mxfp4": Floor(kl=2, top1=0.2),
    }
