"""What the tests of this plugin share."""

import polyquant
import pytest
from polyquant.testing.models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def checkpoint(folder):
    """The checkpoint of a tiny model with options; made once."""

    def make(model="llama", calibration=None, **options):
        out = folder / "-".join([model, *(f"{name}={value}" for name, value in options.items())])
        if not out.exists():
            dense = tiny_model(model, folder / "dense")
            polyquant.quantize(dense, "compressed-tensors", out, calibration=calibration, device="cpu", **options)
        return out

    return make


def load(path, **options):
    return polyquant.load(path, device="cpu", **options)
