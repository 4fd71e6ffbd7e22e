"""The conformance suite. Floors: measured on SmolLM2-135M, CPU, in brackets; KL in nats.

They measure the quantizer of these tests, which is much simpler than AQLM's own.
"""

from pathlib import Path
from typing import ClassVar

from polyquant.models.resolve import resolve_dense
from polyquant.testing import BackendConformance, Floor

from .checkpoints import make

BOOKS = {"2x8": 2, "4x8": 4}


class TestAqlm(BackendConformance):
    backend = "aqlm"
    floors: ClassVar = {
        "2x8": Floor(kl=11.5, top1=0.0),  # 9.77, 0.044: noise
        "4x8": Floor(kl=1.6, top1=0.38),  # 1.23, 0.450
    }
    real_is_slow = True

    def make_checkpoint(self, dense: Path, preset: str, out: Path) -> Path:
        return make(resolve_dense(str(dense)).path, out, books=BOOKS[preset])
