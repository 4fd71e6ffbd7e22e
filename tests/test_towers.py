"""Models with vision beside the language model: the towers stay dense, planned, loaded and saved alike, and said."""

from __future__ import annotations

import polyquant
import pytest
import torch
import transformers
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import SIZES, _tokenizer

from .test_fit import ON_THE_FLY, SAVING

NOTE = "vision and audio parts stay dense: model.vision_tower, model.multi_modal_projector"


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "gemma3"
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 56, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=SIZES, vision_config=vision, mm_tokens_per_image=4, image_token_index=380, boi_token_index=381,
        eoi_token_index=382,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def quantized(loaded, planned):
    """Which tensors are; without second names of what a packed embedding stores, which a tied head has besides."""
    return {layer.name: layer.quantized for layer in loaded.layers if layer.stored_bytes or layer.name in planned}


@pytest.mark.parametrize("backend", [name for name in ON_THE_FLY if name != "gguf"])  # its format is the text's alone
def test_towers_stay_dense(gemma3, backend, tmp_path):
    plan = polyquant.plan(gemma3, backend, device="cpu")
    loaded = polyquant.load(gemma3, backend, device="cpu")
    planned = {tensor.name: tensor.quantized for tensor in plan.tensors}
    assert planned == quantized(loaded, planned)
    towers = [layer for layer in loaded.layers if layer.role == "tower"]
    assert {layer.name.split(".")[1] for layer in towers} == {"vision_tower", "multi_modal_projector"}
    assert not any(layer.quantized for layer in towers)
    assert NOTE in plan.notes
    assert NOTE in loaded.notes
    assert_verified(loaded)
    if backend in SAVING:
        again = polyquant.load(loaded.save(tmp_path / "saved"), device="cpu")
        assert_verified(again)
        assert quantized(again, planned) == planned
