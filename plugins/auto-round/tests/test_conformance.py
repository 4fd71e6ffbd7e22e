"""The conformance suite. Floors: measured on SmolLM2-135M, auto-round 0.16.1, CPU, in brackets; KL in nats."""

from pathlib import Path
from typing import ClassVar

import polyquant
from polyquant.testing import BackendConformance, Floor
from polyquant.testing.texts import CALIBRATION


class TestAutoRound(BackendConformance):
    backend = "auto-round"
    real_is_slow = True
    floors: ClassVar = {
        "rtn-int4": Floor(kl=0.40, top1=0.60),  # 0.312, 0.663
        "int4": Floor(kl=0.18, top1=0.78),  # 0.123, 0.844
        "rtn-int8": Floor(kl=0.012, top1=0.90),  # 0.0066, 0.950
    }

    def make_checkpoint(self, dense: Path, preset: str, out: Path) -> Path:
        """Without text where nothing is tuned: it would be refused. The real model is tuned with polyquant's own prose."""
        options = self.options(preset)
        text = CALIBRATION if options.get("iters") and str(dense) != self.real_model else None
        return polyquant.quantize(str(dense), self.backend, out, calibration=text, device="cpu", **options)
