"""Gemma's integers and rounded activations against transformers' own layers, which run anywhere; what is refused."""

import polyquant
import pytest
import torch
from polyquant.errors import ConfigError, ModelError, UnsupportedOperation
from polyquant.testing.checkpoints import assert_verified, replaced, without
from polyquant.testing.models import tiny_model
from polyquant_row_scales._decode import integers, quantize_gemma, stored_integers
from polyquant_row_scales._layers import linear_from_tensors
from polyquant_row_scales.options import GemmaOptions
from polyquant.testing.oracles import agree
from transformers import AutoModelForCausalLM
from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear

from .conftest import LAYER, TOKENS

MIXED = {"modules": {"layers\\.1\\.mlp": 8, "ers\\.\\d\\.mlp": 2}}  # in the other order of the alphabet


def load(path, **options):
    return polyquant.load(path, "gemma", device="cpu", **options)


def by_transformers(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        return model, model(torch.tensor([TOKENS])).logits[0]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [64, 90, 203])
def test_rows_of_integers_are_packed_and_unpacked(bits, columns):
    weight = torch.randn(7, columns, generator=torch.Generator().manual_seed(0))
    stored, scales = quantize_gemma(weight, bits)
    theirs = QuantizedLinear(columns, 7, num_bits=bits)
    assert (stored.shape, stored.dtype) == (theirs.weight.shape, theirs.weight.dtype)
    theirs.weight.data, theirs.weight_scale.data = stored, scales
    codes = integers(stored, bits, columns)
    assert torch.equal(codes * scales, theirs._dequantize_weights())
    assert torch.equal(stored_integers(codes, bits), stored)
    step = scales if bits > 2 else scales * 1.0001
    assert ((codes * scales - weight).abs() <= step / 2 * 1.0001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scales", [(0.0, 0.0), (0.02, 0.0), (0.0, 0.05), (0.02, 0.05)])
def test_a_layer_answers_as_transformers_one(bits, scales, dtype):
    torch.manual_seed(0)
    theirs = QuantizedLinear(90, 70, bias=True, num_bits=bits).to(dtype)
    theirs.weight.data, theirs.weight_scale.data = quantize_gemma(torch.randn(70, 90) * 0.1, bits)
    names = ("input_activation_scale", "output_activation_scale")
    for name, scale in zip(names, scales, strict=True):
        getattr(theirs, name).data = torch.tensor(scale)
    ours = linear_from_tensors(torch.nn.Linear(90, 70), GemmaOptions(num_bits=bits), dtype, theirs.state_dict())
    x = torch.randn(3, 5, 90, dtype=dtype)
    x[0, 0, :4] = torch.tensor([50.0, -50.0, 0.01, 0.03])  # beyond the ranges, and ties
    with torch.inference_mode():
        agree("gemma", "transformers' QuantizedLinear", ours(x), theirs(x))
    assert ("rounded to int8" in ours.kernel) == any(scales)


def test_the_gradient_passes_rounded_activations(made):
    torch.manual_seed(0)
    weight, scales = quantize_gemma(torch.randn(70, 90) * 0.1, 4)
    tensors = {"weight": weight, "weight_scale": scales, "input_activation_scale": torch.tensor(0.02)}
    layer = linear_from_tensors(torch.nn.Linear(90, 70, bias=False), GemmaOptions(), torch.float32, tensors)
    x, gradient = torch.randn(3, 90, requires_grad=True), torch.randn(3, 70)
    layer(x).backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ layer.dequantize())


def with_ranges(tensors):
    for name in [name for name in tensors if name.endswith("activation_scale")]:
        tensors[name] = torch.tensor(0.04 if "input" in name else 0.1)
    tensors["model.layers.0.self_attn.k_cache_scale"] = torch.tensor(0.1)


def test_a_checkpoint_with_ranges_and_mixed_bits_answers_as_transformers(made, changed, tmp_path):
    """Ranges of activations are part of the answer; scales of a cache are left out by both."""
    path = changed(made("gemma", **MIXED), with_ranges)
    loaded = load(path)
    assert_verified(loaded)
    assert any("are rounded to int8" in note for note in loaded.notes)
    _, expected = by_transformers(path)
    torch.testing.assert_close(loaded.logits(TOKENS), expected, rtol=1e-4, atol=1e-4)
    off = load(made("gemma", **MIXED))
    assert not any("are rounded to int8" in note for note in off.notes)
    assert (loaded.logits(TOKENS) - off.logits(TOKENS)).abs().max() > 0.01
    bits = {layer.name: layer.bits for layer in loaded.layers if layer.quantized}
    assert (bits[f"{LAYER}.weight"], bits[f"{LAYER.replace('1', '0')}.weight"]) == (8, 2)
    assert bits["model.layers.0.self_attn.q_proj.weight"] == 4
    again = load(loaded.save(tmp_path / "again"))
    assert again.config == loaded.config
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_embeddings_of_integers_answer_as_transformers(made, bits):
    path = made("gemma", num_bits=bits, quantize_embeddings=True)
    loaded = load(path)
    assert_verified(loaded)
    model, expected = by_transformers(path)
    assert type(model.model.embed_tokens) is QuantizedEmbedding
    torch.testing.assert_close(loaded.logits(TOKENS), expected, rtol=1e-4, atol=1e-4)
    (layer,) = [layer for layer in loaded.layers if layer.role == "embedding"]
    assert (layer.quantized, layer.bits) == (True, bits)


def test_embeddings_may_have_scales_of_blocks(made, changed):
    def blocks(tensors):
        name = "model.embed_tokens.embedding_scale"
        tensors[name] = tensors[name] * torch.linspace(0.5, 2, 4)

    loaded = load(changed(made("gemma", num_bits=4, quantize_embeddings=True), blocks))
    embedding = loaded.model.model.embed_tokens
    theirs = QuantizedEmbedding(embedding.num_embeddings, 256, torch.float32, num_bits=4)
    theirs.embedding_quantized.data, theirs.embedding_scale.data = (
        embedding.embedding_quantized,
        embedding.embedding_scale,
    )
    ids = torch.tensor([TOKENS])
    assert torch.equal(embedding(ids), theirs(ids))


def test_a_model_that_rounds_activations_is_not_made_dense(made, changed):
    loaded = load(changed(made("gemma", num_bits=4), with_ranges))
    with pytest.raises(UnsupportedOperation, match="more than a weight and a bias"):
        loaded.model.dequantize()


@pytest.mark.parametrize(
    ("tensors", "stored", "words"),
    [
        (without(f"{LAYER}.weight_scale"), None, r"up_proj.weight is torch.uint8, and has no weight_scale "),
        (replaced(f"{LAYER}.weight", lambda weight: weight[:, :-1].clone()), None, r"should be \(512, 128\) uint8, and is \(512, 127"),
        (replaced(f"{LAYER}.input_activation_scale", lambda scale: scale - 1), None, "holds -1.0 to -1.0"),
        (None, {"num_bits": 3}, "cannot read its quantization_config"),
        (None, {"module_quant_configs": {"mlp": {"num_bits": 4, "group_size": 8}}}, "has group_size for 'mlp', which is not"),
        (None, {"module_quant_configs": {"(": {"num_bits": 4}}}, "no regular expression"),
        (None, {"num_bits": 8}, r"should be \(\d+, 256\) int8, and is"),
        (None, {"quantize_embeddings": True}, "embeddings of integers in the checkpoint are none"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(made, changed, tensors, stored, words):
    path = changed(made("gemma", num_bits=4), tensors, stored and (lambda found: found.update(stored)))
    with pytest.raises(ModelError, match=words):
        load(path)


def test_a_head_that_is_tied_to_integers_is_refused(folder):
    with pytest.raises(ConfigError, match="the head is tied to model.embed_tokens.weight"):
        load(tiny_model("llama-tied", folder), quantize_embeddings=True)
