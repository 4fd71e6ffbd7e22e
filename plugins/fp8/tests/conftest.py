"""What the tests of this plugin share."""

from functools import partial
import polyquant
import pytest
from polyquant.testing.checkpoints import changed_copy
from polyquant.testing.models import tiny_model


LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return load(tiny_model("qwen2", folder)).save(folder / "quantized")


@pytest.fixture
def changed(checkpoint, tmp_path):
    """The checkpoint with its tensors and its quantization_config changed by functions."""
    return partial(changed_copy, checkpoint, tmp_path)


def load(path, **options):
    return polyquant.load(path, "fp8", device="cpu", **options)
