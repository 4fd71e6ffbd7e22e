"""What the tests of this plugin share."""

import pytest

from .checkpoints import packed_gpt_oss


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def mxfp4_checkpoint(folder):
    """gpt-oss in MXFP4."""
    return packed_gpt_oss(folder)[0]
