"""What the tests of this plugin share."""

import polyquant
import pytest
import torch
from polyquant.testing.models import tiny_model
from transformers import AutoModelForCausalLM

from .checkpoints import make

TOKENS = [3, 4, 5, 6, 7, 8, 9, 10]
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def eager():
    """transformers compiles the functions of its layers, which takes minutes here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return make(tiny_model("qwen2", folder), folder / "quantized", "autobitlinear")


def load(path, **options):
    return polyquant.load(path, "bitnet", device="cpu", **options)


def theirs(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model, tokens=TOKENS):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]
