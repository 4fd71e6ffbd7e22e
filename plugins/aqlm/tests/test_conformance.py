"""The conformance suite. Floors: measured on SmolLM2-135M, CPU, in brackets; KL in nats.

They measure the quantizer of these tests, which is much simpler than AQLM's own.
"""

from pathlib import Path
from typing import ClassVar

import pytest
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

    @pytest.fixture(autouse=True)
    def _one_thread(self):
        """aqlm's own kernel, which transformers uses, adds to one number from several threads: right only with one."""
        import numba

        before = numba.get_num_threads()
        numba.set_num_threads(1)
        yield
        numba.set_num_threads(before)

    def make_checkpoint(self, dense: Path, preset: str, out: Path) -> Path:
        books = BOOKS.get(preset) or int(preset.removeprefix("bits="))  # of 256 vectors of 8 weights: a bit a weight
        return make(resolve_dense(str(dense)).path, out, books=books)
