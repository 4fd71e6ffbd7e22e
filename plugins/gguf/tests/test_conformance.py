"""The promises of the card, kept."""

from pathlib import Path

import polyquant
from polyquant.plugin.gguf import TYPES
from polyquant.testing import BackendConformance, Floor
from polyquant.testing.gguf_files import in_blocks_of


class TestGguf(BackendConformance):
    backend = "gguf"
    floors = {
        "Q4_0": Floor(kl=0.32, top1=0.67),
        "Q4_1": Floor(kl=0.001, top1=0.95),  # the real model was Q4_1 before: nothing is lost a second time
        "Q5_0": Floor(kl=0.08, top1=0.8),
        "Q5_1": Floor(kl=0.15, top1=0.79),
        "Q8_0": Floor(kl=0.002, top1=0.94),
    }

    def make_checkpoint(self, dense: Path, preset: str, out: Path) -> Path:
        """Of a type that only llama.cpp writes, or of so many bits."""
        asked = preset.partition("=")[2]
        kind = next(name for name, block in TYPES.items() if block.packed and asked in (name, f"{block.bits:g}"))
        (plain,) = polyquant.quantize(str(dense), self.backend, out.with_name("plain"), type="Q8_0").glob("*.gguf")
        return in_blocks_of(kind, plain, out)
