"""The promises of the card, kept. Floors: measured on SmolLM2-135M, CPU, in brackets; KL in nats.

Its embedding, which its head is tied to, is quantized too.
"""

from typing import ClassVar

from polyquant.testing import BackendConformance, Floor


class TestMlx(BackendConformance):
    backend = "mlx"
    floors: ClassVar = {
        "int4": Floor(kl=0.50, top1=0.57),  # 0.3975, 0.637
        "int8": Floor(kl=0.004, top1=0.94),  # 0.0023, 0.969
        "mxfp4": Floor(kl=1.05, top1=0.47),  # 0.8192, 0.544
    }
