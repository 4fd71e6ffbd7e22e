"""kernel="packed": blocks in polyquant's own layout are the same numbers, and what has no place there stays."""

import polyquant
import pytest
import torch
from polyquant.plugin.gguf import TYPES
from polyquant.plugin.layers import PackedLinear as RepackedLinear
from polyquant.testing.gguf_files import in_blocks_of, random_blocks
from polyquant.testing.models import tiny_model
from polyquant_gguf._layers import pack
from polyquant_gguf._modules import PackedEmbedding, PackedLinear
from polyquant_gguf.planning import LAYOUTS

from .conftest import tiny, write_gguf

IDS = [5, 17, 40, 3, 3, 88, 21, 60]


@pytest.mark.parametrize("name", LAYOUTS)
def test_random_blocks_bit_for_bit(name):
    blocks = torch.from_numpy(random_blocks(name, 3 * 20).reshape(20, -1))  # 20 rows are no multiple of 8
    layer = PackedLinear(blocks, TYPES[name])
    weight = pack(layer)
    assert (weight.shape, weight.format) == (layer.logical_shape, LAYOUTS[name])
    assert torch.equal(weight.decode(), layer.dequantize())


def test_every_exponent_of_mxfp4():
    blocks = torch.from_numpy(random_blocks("MXFP4", 256)).reshape(256, -1).clone()
    blocks[:, 0] = torch.arange(256)
    layer = PackedLinear(blocks, TYPES["MXFP4"])
    assert torch.equal(pack(layer).decode(), layer.dequantize())


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_NL", "NVFP4", "Q6_K"])
def test_types_that_only_files_have(tmp_path, name):
    dense = tiny("qwen2", hidden_size=256, intermediate_size=256, head_dim=64, tie_word_embeddings=False)
    path = in_blocks_of(name, write_gguf(tmp_path / "plain.gguf", dense, "qwen2", "Q8_0"), tmp_path / "out")
    library, packed = (polyquant.load(path, "gguf", kernel=kernel) for kernel in ("library", "packed"))
    assert polyquant.verify(packed).passed
    expected = library.logits(IDS)
    assert (packed.logits(IDS) - expected).abs().max() <= 5e-3 * expected.abs().max()  # random weights, and large ones
    roles = [{(each.name, each.role, each.scheme, each.bits) for each in loaded.layers} for loaded in (library, packed)]
    assert roles[0] == roles[1]
    moved = {each for each, module in packed.model.named_modules() if isinstance(module, RepackedLinear)}
    assert ("model.layers.1.mlp.up_proj" in moved) == (name in LAYOUTS)
    assert "lm_head" in moved  # in Q8_0, and described as the head
    assert not isinstance(packed.model.model.embed_tokens, PackedEmbedding)  # in Q8_0 too
    left = any("no place in the packed layout" in note for note in packed.notes)
    assert left == (name not in LAYOUTS)


@pytest.mark.parametrize("embedding", ["Q8_0", "Q4_0", "TQ1_0"])
@pytest.mark.parametrize("name", ["llama-tied", "llama"])
def test_an_embedding_in_blocks_moves_with_the_head_that_is_tied_to_it(tmp_path, name, embedding):
    options = {"type": "Q4_0", "embedding_type": embedding, "device": "cpu", "head": "keep"}
    library, loaded = (
        polyquant.load(tiny_model(name, tmp_path), "gguf", kernel=kernel, **options) for kernel in ("library", "packed")
    )
    assert polyquant.verify(loaded).passed
    roles = [
        {(each.name, each.role, each.scheme, each.bits, each.shape) for each in one.layers} for one in (library, loaded)
    ]
    assert roles[0] == roles[1]
    model, moved = loaded.model, embedding in LAYOUTS
    assert isinstance(model.model.embed_tokens, PackedEmbedding) is not moved
    assert isinstance(model.lm_head, RepackedLinear) is (moved and name == "llama-tied")
    assert any("no place in the packed layout" in note for note in loaded.notes) is not moved
    expected = library.logits(IDS)
    assert (loaded.logits(IDS) - expected).abs().max() <= 1e-3 * expected.abs().max()
    again = polyquant.load(loaded.save(tmp_path / "out"), kernel="packed", device="cpu", head="keep")
    assert torch.equal(again.logits(IDS), loaded.logits(IDS))


def test_a_file_does_not_say_what_multiplies(tmp_path):
    loaded = polyquant.load(tiny_model("llama", tmp_path), "gguf", type="Q4_1", kernel="packed")
    out = loaded.save(tmp_path / "out")
    assert b'"kernel"' not in (out / "model.gguf").read_bytes()
    assert polyquant.load(out).config.kernel == "auto"
    again = polyquant.load(out, kernel="packed")
    assert torch.equal(again.logits(IDS), loaded.logits(IDS))
    assert (again.save(tmp_path / "more") / "model.gguf").read_bytes() == (out / "model.gguf").read_bytes()
