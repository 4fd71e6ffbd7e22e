"""The conformance suite. Floors: measured on SmolLM2-135M, CPU, in brackets; KL in nats.

Checkpoints of VPTQ, SpQR and EXL3 are made without calibration here, those of EXL3 of any states: noise. What the layers
compute is in the tests of each format.
"""

from pathlib import Path
from typing import ClassVar

from polyquant.testing import BackendConformance, Floor

from .checkpoints import make_exl3, make_spqr, make_vptq


class TestVptq(BackendConformance):
    backend = "vptq"
    floors: ClassVar = {"2bit": Floor(kl=18.0, top1=0.0)}

    def make_checkpoint(self, dense: Path, preset: str, out: Path) -> Path:
        return make_vptq(dense, preset, out)


class TestHiggs(BackendConformance):
    backend = "higgs"
    floors: ClassVar = {"4bit": Floor(kl=1.0, top1=0.5)}
    expected_failures: ClassVar = {
        "test_stays_close_to_the_dense_model[4bit]": "its 576 rows are no whole tiles of 128",
        "test_what_is_declared_loads[scheme=higgs2]": "the tiny model's 128 rows are no whole tiles of 256",
        "test_what_is_declared_loads[scheme=higgs3]": "the tiny model's 128 rows are no whole tiles of 512",
    }


class TestSpqr(BackendConformance):
    backend = "spqr"
    floors: ClassVar = {"3bit": Floor(kl=18.0, top1=0.0)}

    def make_checkpoint(self, dense: Path, preset: str, out: Path) -> Path:
        return make_spqr(dense, preset, out)


class TestExl3(BackendConformance):
    backend = "exl3"
    floors: ClassVar = {"4bit": Floor(kl=18.0, top1=0.0)}
    expected_failures: ClassVar = {
        "test_stays_close_to_the_dense_model[4bit]": "its 576 rows are no whole blocks of 128",
    }

    def make_checkpoint(self, dense: Path, preset: str, out: Path) -> Path:
        return make_exl3(dense, preset, out)
