"""The conformance suite. Floors: measured on SmolLM2-135M, CPU, in brackets; KL in nats.

A model that was not trained as ternary is noise when it is rounded so; see test_bitnet.py for what the layers compute.
"""

from pathlib import Path
from typing import ClassVar

from polyquant.models.resolve import resolve_dense
from polyquant.testing import BackendConformance, Floor

from .checkpoints import make


class TestBitnet(BackendConformance):
    backend = "bitnet"
    floors: ClassVar = {
        "bitlinear": Floor(kl=18.0, top1=0.0),  # 15.69, 0.000
        "autobitlinear": Floor(kl=18.0, top1=0.0),  # 15.69, 0.000
    }

    def make_checkpoint(self, dense: Path, preset: str, out: Path) -> Path:
        return make(resolve_dense(str(dense)).path, out, preset)
