"""What the tests of this plugin share."""

import pytest

LAYER = "model.layers.1.mlp.up_proj"
TOKENS = [3, 4, 5, 6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")
