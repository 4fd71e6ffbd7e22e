"""The conformance suite. Floors: measured on SmolLM2-135M, compressed-tensors 0.19.0, CPU, in brackets; KL in nats."""

from typing import ClassVar

import polyquant
from polyquant.testing import BackendConformance, Floor
from polyquant.testing.texts import CALIBRATION


class TestCompressedTensors(BackendConformance):
    backend = "compressed-tensors"
    real_is_slow = True
    floors: ClassVar = {}

    def make_checkpoint(self, dense, preset, out):
        """Calibration text goes to GPTQ only: rounding to nearest refuses it."""
        options = dict(polyquant.backend(self.backend).info.presets[preset])
        text = CALIBRATION if options.get("method") == "gptq" else None
        polyquant.quantize(dense, self.backend, out, calibration=text, **options)
