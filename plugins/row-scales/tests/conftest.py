"""What the tests of this plugin share."""

import polyquant
import pytest
from polyquant.testing.checkpoints import changed_copy
from polyquant.testing.models import tiny_model

LAYER = "model.layers.1.mlp.up_proj"
TOKENS = [3, 4, 5, 6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def made(folder):
    """(backend, options) -> a checkpoint of the tiny Qwen2, which has biases."""

    def make(backend, **options):
        out = folder / "-".join([backend, *map(str, options.values())])
        if not out.exists():
            polyquant.load(tiny_model("qwen2", folder), backend, device="cpu", **options).save(out)
        return out

    return make


@pytest.fixture
def changed(tmp_path):
    """A checkpoint with its tensors and its quantization_config changed by functions."""
    return lambda checkpoint, tensors=None, stored=None: changed_copy(checkpoint, tmp_path, tensors, stored)
