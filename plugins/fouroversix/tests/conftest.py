"""What the tests of this plugin share."""

import polyquant
import pytest
from polyquant.testing.models import tiny_model


TOKENS = [3, 4, 5, 6, 7, 8, 9, 10]
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return load(tiny_model("qwen2", folder)).save(folder / "quantized")


def load(path, **options):
    return polyquant.load(path, "fouroversix", device="cpu", **options)
