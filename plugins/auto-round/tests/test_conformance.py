"""The conformance suite. Floors: measured on SmolLM2-135M, auto-round 0.16.1, CPU, in brackets; KL in nats."""

from pathlib import Path
from typing import ClassVar

import polyquant
from polyquant.testing import BackendConformance
from polyquant.testing.texts import CALIBRATION


class TestAutoRound(BackendConformance):
    backend = "auto-round"
    real_is_slow = True
    floors: ClassVar = {}

    def make_checkpoint(self, dense: Path, preset: str, out: Path) -> Path:
        """Without text where nothing is tuned: it would be refused. The real model is tuned with polyquant's own prose."""
        options = polyquant.backend(self.backend).info.presets[preset]
        text = CALIBRATION if options["iters"] and str(dense) != self.real_model else None
        return polyquant.quantize(str(dense), self.backend, out, calibration=text, device="cpu", **options)
