"""The conformance suite. Floors: measured on SmolLM2-135M, llama-cpp-python 0.3.36, CPU, in brackets; KL in nats."""

from pathlib import Path
from typing import ClassVar, get_args

import polyquant
import pytest
from polyquant.testing import BackendConformance, Floor
from polyquant.testing.gguf_files import in_blocks_of
from polyquant_llama_cpp.formats import ReadOnly


class TestLlamaCpp(BackendConformance):
    backend = "llama-cpp"
    floors: ClassVar = {
        "Q4_K_M": Floor(kl=0.075, top1=0.84),  # 0.050, 0.900; rows of 576 and most types substituted, see README
        "Q4_0": Floor(kl=0.33, top1=0.64),  # 0.260, 0.700
        "Q8_0": Floor(kl=0.008, top1=0.93),  # 0.0041, 0.975
    }

    @pytest.fixture(autouse=True)
    def _writer(self, write):
        type(self).write = staticmethod(write)

    def make_checkpoint(self, dense: Path, preset: str, out: Path) -> Path:
        """From a float32 GGUF of the tiny model, or the packaged GGUF of the real one: what its dense checkpoint is of."""
        more = {}
        if (dense / "config.json").exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            source = type(self).write(dense, out.parent / f"{dense.name}.gguf")
        else:
            source, more = str(dense), {"requantize": True, "fallback": True}
        options = self.options(preset)
        if options["type"] in get_args(ReadOnly):  # only with an importance matrix, or not at all
            return in_blocks_of(preset.partition("=")[2], source, out)
        return polyquant.quantize(source, "llama-cpp", out, **options, **more)
