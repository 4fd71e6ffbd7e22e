"""The conformance suite. Floors: measured on SmolLM2-135M, amd-quark 0.13, CPU, in brackets; KL in nats."""

from pathlib import Path
from typing import ClassVar

import polyquant
from polyquant.testing import BackendConformance, Floor


class TestQuark(BackendConformance):
    backend = "quark"
    floors: ClassVar = {}
    real_is_slow = True

    def make_checkpoint(self, dense: Path, preset: str, out: Path) -> Path:
        """Without calibration text: it would be refused."""
        options = polyquant.backend(self.backend).info.presets[preset]
        return polyquant.quantize(str(dense), self.backend, out, device="cpu", **options)
