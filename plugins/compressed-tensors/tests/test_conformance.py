"""The conformance suite. Floors: measured on SmolLM2-135M, compressed-tensors 0.19.0, CPU, in brackets; KL in nats."""

from typing import ClassVar

import polyquant
from polyquant.testing import BackendConformance, Floor
from polyquant.testing.texts import CALIBRATION

from .sparsity import write_sparse


class TestCompressedTensors(BackendConformance):
    backend = "compressed-tensors"
    real_is_slow = True
    floors: ClassVar = {
        "int4": Floor(kl=0.47, top1=0.62),  # 0.368, 0.688
        "int8": Floor(kl=0.008, top1=0.93),  # 0.0036, 0.963
        "fp8": Floor(kl=0.03, top1=0.88),  # 0.0190, 0.938
        "int4-gptq": Floor(kl=0.26, top1=0.70),  # 0.188, 0.769; polyquant's prose, 64 windows of 512 tokens
    }

    def make_checkpoint(self, dense, preset, out):
        """Text goes to GPTQ only, rounding to nearest refuses it; for tiny models a little, else polyquant's prose."""
        options = self.options(preset)
        if options.get("weights") == "sparse":
            write_sparse(dense, out)
            return
        asked = options.get("method") == "gptq" or options.get("static_activations") or (
            options.get("weights") == "nvfp4" and options.get("dynamic_activations")
        )  # fmt: skip
        text = CALIBRATION if asked and dense.exists() else None
        polyquant.quantize(str(dense), self.backend, out, calibration=text, **options)
