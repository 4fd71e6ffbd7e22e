"""What the tests of this plugin share."""

import polyquant
import pytest
from polyquant.plugin.process import kept_processes
from polyquant.testing import warm
from polyquant.testing.models import tiny_model


@pytest.fixture(scope="package", autouse=True)
def one_process():
    """Checkpoints are made in one process, one after the other: its imports take most of the time."""
    with warm.as_executable(), kept_processes():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def made(folder):
    """A checkpoint of llama, or another model, with some options; each made once."""

    def make(model="llama", calibration=None, **options):
        out = folder / "-".join(["packed", model, *(f"{name}={value}" for name, value in options.items())])
        if not out.exists():
            quantize(tiny_model(model, folder), out, calibration=calibration, **options)
        return out

    return make


def quantize(path, out, **options):
    return polyquant.quantize(path, "auto-round", out, device="cpu", **options)
