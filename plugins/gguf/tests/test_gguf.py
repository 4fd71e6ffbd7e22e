"""GGUF files: loaded as the dense model they were made of, packed; saved byte for byte; refused where they lie."""

import json
import re
import shutil

import polyquant
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, quants
from polyquant.plugin import WeightInfo, layers
from polyquant.errors import CheckpointConflict, ConfigError, DenseModelError, ModelError, SaveError
from polyquant.testing.models import SIZES, tiny_model
from polyquant_gguf import _modules
from polyquant.plugin.gguf import DESCRIBED, TYPES
from polyquant_gguf.names import ARCHITECTURES
from polyquant_gguf.options import GgufOptions
from polyquant_gguf.planning import plan_layers
from transformers import AutoModelForCausalLM
from .conftest import tiny, write_gguf


IDS = [5, 17, 40, 3, 3, 88, 21, 60]


NOT_THEIRS = {own.architecture for own in DESCRIBED.values() if not own.has_experts}
"""Architectures whose GGUF files transformers does not read."""
PARTICULARS = {  # what transformers reads of a GGUF's config leaves these to the class's defaults
    "qwen3": {"head_dim": 128}, "gemma2": {"head_dim": 256}, "gemma3": {"head_dim": 256}, "stablelm": {}, "phi3": {}, "nemotron": {}, "starcoder2": {},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "command-r": {"logit_scale": 0.5},
}  # fmt: skip


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0].float()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_is_the_model_it_was_made_of(architecture, tied, tmp_path):
    tied = tied or architecture in ("gemma", "gemma2", "command-r")  # which GGUF has with tied embeddings only
    dense = tiny(architecture, tie_word_embeddings=tied, **PARTICULARS.get(architecture, {}))
    path = write_gguf(tmp_path / "model.gguf", dense, architecture)
    with pytest.raises(DenseModelError):
        polyquant.load(path, "gguf")
    loaded = polyquant.load(path, "gguf", allow_dequantize=True)
    torch.testing.assert_close(logits(loaded.model), logits(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in NOT_THEIRS])
def test_packed_equals_transformers_dequantized(architecture, tmp_path):
    dense = tiny(architecture, tie_word_embeddings=architecture == "gemma2", **PARTICULARS.get(architecture, {}))
    path = write_gguf(tmp_path / "model.gguf", dense, architecture, "Q5_1")
    loaded = polyquant.load(path, "gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(loaded.model), logits(theirs), rtol=1e-5, atol=1e-5)
    packed = [module for module in loaded.model.modules() if isinstance(module, _modules.Packed)]
    assert packed and all(module.weight.dtype == torch.uint8 for module in packed)
    assert polyquant.verify(loaded).memory.weights_stored_bytes < 1.1 * path.stat().st_size


def test_llama_3_rope_factors_scale_the_rotary_frequencies(tmp_path):
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 32}  # fmt: skip
    dense = tiny("llama", rope_parameters=scaled, tie_word_embeddings=True)
    plain = tiny("llama", tie_word_embeddings=True)
    factors = plain.model.rotary_emb.inv_freq / dense.model.rotary_emb.inv_freq
    assert factors.max() > 1
    path = write_gguf(tmp_path / "model.gguf", dense, "llama", "Q8_0", rope_freqs__weight=factors)
    loaded = polyquant.load(path, "gguf")
    torch.testing.assert_close(loaded.model.model.rotary_emb.inv_freq, dense.model.rotary_emb.inv_freq)


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("keys", ["scaling", "scale_linear"])
def test_linear_rotary_scaling(architecture, keys, tmp_path):
    """Of Gemma 3 it is that of full attention alone, as llama.cpp computes."""
    sizes = PARTICULARS.get(architecture, {})
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    kinds = {"full_attention": LINEAR, "sliding_attention": plain}
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if architecture == "gemma3" else {}
    rope = kinds if architecture == "gemma3" else LINEAR
    dense = tiny(architecture, tie_word_embeddings=False, rope_parameters=rope, **sizes, **layers)
    scaling = {"rope.scaling.type": None, "rope.scaling.factor": None, "rope.scale_linear": 4.0}
    more = {f"{architecture}.{key}": value for key, value in scaling.items()} if keys == "scale_linear" else {}
    path = write_gguf(tmp_path / "model.gguf", dense, architecture, more=more)
    loaded = polyquant.load(path, "gguf", allow_dequantize=True)
    if architecture != "gemma3":  # whose two layers would both slide, by the reader's default pattern
        torch.testing.assert_close(logits(loaded.model), logits(dense), rtol=1e-5, atol=1e-5)
    found = loaded.model.config.rope_parameters
    assert found.get("full_attention", found) == LINEAR
    assert found.get("sliding_attention", plain)["rope_type"] == "default"
    with pytest.raises(ModelError, match="has the factor 0.0"):
        broken = {**more, f"{architecture}.rope.scaling.type": "linear", f"{architecture}.rope.scaling.factor": 0.0}
        polyquant.load(write_gguf(tmp_path / "broken.gguf", dense, architecture, more=broken), "gguf")


def test_types_that_are_no_blocks_stay_as_they_are(llama, tmp_path):
    dense, _ = llama
    path = write_gguf(tmp_path / "half.gguf", dense, "llama", "F16")
    loaded = polyquant.load(path, "gguf", allow_dequantize=True)
    report = polyquant.verify(loaded)
    matrices = [layer for layer in report.layers if layer.role in ("linear", "head", "embedding")]
    assert {(layer.scheme, layer.quantized, layer.reason) for layer in matrices} == {
        ("float16", False, "the file holds it as F16, no blocks")
    }
    assert report.memory.weights_stored_bytes == report.memory.weights_planned_bytes < 1.1 * path.stat().st_size


def test_a_file_saves_as_itself(llama, tmp_path):
    _, path = llama
    for dtype in ("float32", "bfloat16"):
        loaded = polyquant.load(path, "gguf", compute_dtype=dtype)
        loaded.logits(IDS)
        out = loaded.save(tmp_path / dtype)
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_what_was_changed_in_memory_is_saved(llama, tmp_path):
    _, path = llama
    loaded = polyquant.load(path, "gguf")
    with torch.no_grad():
        loaded.model.model.norm.weight.mul_(1.5)
        loaded.model.model.layers[0].self_attn.q_proj.weight[0, 2:].fill_(7)
    expected = loaded.logits(IDS)
    again = polyquant.load(loaded.save(tmp_path / "out"))
    assert torch.equal(again.logits(IDS), expected)


def test_packed_rows_are_embedded_one_by_one():
    numbers = torch.randn(50, 64)
    block = TYPES["Q8_0"]
    weight = torch.from_numpy(quants.quantize(numbers.numpy(), GGMLQuantizationType.Q8_0))
    table = _modules.PackedEmbedding(weight, block, torch.float32)
    ids = torch.tensor([[3, 3], [49, 0]])
    assert torch.equal(table(ids), table.numbers(weight, torch.float32)[ids])


def test_a_matrix_in_pieces_multiplies_as_a_whole(monkeypatch):
    weight = torch.from_numpy(quants.quantize(torch.randn(70, 64).numpy(), GGMLQuantizationType.Q4_1))
    bias = torch.nn.Parameter(torch.randn(70))
    layer = _modules.PackedLinear(weight, TYPES["Q4_1"], bias)
    x = torch.randn(2, 5, 64, requires_grad=True)
    whole = layer(x)
    monkeypatch.setitem(layers.CHUNK_WEIGHTS, "cpu", 64 * 16)
    torch.testing.assert_close(layer(x), whole)
    layer(x).sum().backward()
    assert x.grad is not None


# on the fly


def test_the_embedding_is_packed_on_request_with_the_head_tied_to_it(tmp_path):
    loaded = polyquant.load(tiny_model("llama-tied", tmp_path), "gguf", type="Q4_0", embedding_type="Q8_0")
    layers = {layer.name: layer for layer in loaded.layers}
    embedding, head = layers["model.embed_tokens.weight"], layers["lm_head.weight"]
    assert (embedding.scheme, embedding.quantized, embedding.role) == ("Q8_0", True, "embedding")
    assert (head.reason, head.stored_bytes, head.shape) == ("tied to model.embed_tokens.weight", 0, embedding.shape)
    assert polyquant.verify(loaded).passed
    again = polyquant.load(loaded.save(tmp_path / "out"))
    assert again.config == loaded.config and torch.equal(again.logits(IDS), loaded.logits(IDS))


def test_a_written_file_reads_in_transformers(tmp_path):
    loaded = polyquant.load(tiny_model("llama", tmp_path), "gguf", type="Q5_0")
    out = loaded.save(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(theirs), loaded.logits(IDS))


def test_a_tokenizer_gguf_cannot_express_is_written_beside(tmp_path):
    from tokenizers import normalizers

    loaded = polyquant.load(tiny_model("llama", tmp_path), "gguf")
    loaded.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    out = loaded.save(tmp_path / "out")
    assert any("cannot express this tokenizer" in note for note in loaded.notes)
    again = polyquant.load(out)
    assert again.tokenizer("Lake LAKE").input_ids == loaded.tokenizer("lake lake").input_ids


def test_rows_that_are_no_whole_blocks_are_refused_by_name(tmp_path):
    with pytest.raises(
        ConfigError, match=r"TQ1_0 blocks of 256 weights do not divide in_features 90 in .*q_proj\.weight"
    ):
        polyquant.load(tiny_model("odd", tmp_path), "gguf", type="TQ1_0")


@pytest.mark.parametrize(
    ("role", "module", "fix"),
    [
        ("linear", "Linear", "type='Q4_0' or type='Q8_0' or skip=('up_proj',)"),
        ("embedding", "Embedding", "embedding_type='dense'"),
    ],
)
def test_what_would_fit_instead_is_said(role, module, fix):
    weight = WeightInfo(name="model.up_proj.weight", shape=(64, 96), dtype="float32", role=role, module=module)
    config = GgufOptions(type="TQ1_0", embedding_type="TQ1_0")
    with pytest.raises(
        ConfigError, match=re.escape(f"do not divide in_features 96 in model.up_proj.weight (64, 96); use {fix}")
    ):
        plan_layers([weight], config)


def test_models_without_a_gguf_form_are_not_written(tmp_path):
    sizes = {name: size for name, size in SIZES.items() if name not in ("head_dim", "tie_word_embeddings")}
    transformers.HeliumForCausalLM(transformers.HeliumConfig(**sizes, head_dim=64)).save_pretrained(tmp_path / "helium")
    transformers.AutoTokenizer.from_pretrained(tiny_model("llama", tmp_path)).save_pretrained(tmp_path / "helium")
    loaded = polyquant.load(tmp_path / "helium", "gguf", type="Q4_0")
    with pytest.raises(SaveError, match="no GGUF can be written for 'helium'"):
        loaded.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _with_config(folder, out, **changes):
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | changes))
    return out


def test_words_of_a_config_that_no_model_reads_do_not_matter(tmp_path):
    """As checkpoints of the hub have them; Qwen2's window layers count where there is a window."""
    words = {"max_window_layers": 21, "transformers.js_config": {"dtype": "q4"}, "is_llama_config": True}
    folder = _with_config(tiny_model("qwen2", tmp_path), tmp_path / "words", **words)
    loaded = polyquant.load(folder, "gguf", type="Q4_0", kernel="library")
    assert torch.equal(polyquant.load(loaded.save(tmp_path / "out"), kernel="library").logits(IDS), loaded.logits(IDS))


@pytest.mark.parametrize("changes", [{"sliding_window": 64}, {"hidden_act": "gelu"}])
def test_what_a_model_reads_and_a_gguf_does_not_say_is_refused(tmp_path, changes):
    folder = _with_config(tiny_model("mixtral", tmp_path), tmp_path / "other", **changes)
    loaded = polyquant.load(folder, "gguf", type="Q4_0")
    (name,) = changes
    with pytest.raises(SaveError, match=f"GGUF metadata cannot express this model for transformers: {name}"):
        loaded.save(tmp_path / "out")


def test_types_are_the_files(llama):
    _, path = llama
    with pytest.raises(CheckpointConflict, match="type: requested 'Q4_0', stored 'file'"):
        polyquant.load(path, "gguf", type="Q4_0")
    assert polyquant.load(path, "gguf").config.weight_bits == 8


def test_type_file_needs_a_file(tmp_path):
    with pytest.raises(ConfigError, match="type 'file' is for GGUF files"):
        polyquant.load(tiny_model("llama", tmp_path), "gguf", type="file")


@pytest.mark.real
def test_the_packaged_model_packed_is_the_dense_one():
    from polyquant.models.builtin import packaged_gguf
    from polyquant.models.resolve import resolve_dense

    path = packaged_gguf("builtin:smollm2")
    loaded = polyquant.load(path, "gguf")
    report = polyquant.verify(loaded, max_new_tokens=8)
    assert report.passed, report.failures
    assert report.memory.weights_stored_bytes <= 1.1 * path.stat().st_size
    dense = AutoModelForCausalLM.from_pretrained(resolve_dense("builtin:smollm2").path, dtype=torch.float32).eval()
    ids = loaded.tokenizer("The old lighthouse keeper counted 17 ships before the fog closed in.").input_ids
    with torch.inference_mode():
        reference = dense(torch.tensor([ids])).logits[0].log_softmax(-1)
    kl = (reference.exp() * (reference - loaded.logits(ids).log_softmax(-1))).sum(-1).mean()
    assert kl < 1e-3


@pytest.mark.parametrize("embedding_type", ["Q8_0", "dense"])
def test_dequantized_it_is_dense_with_its_embedding_and_the_head_tied_to_it(tmp_path, embedding_type):
    loaded = polyquant.load(
        tiny_model("llama-tied", tmp_path), "gguf", type="Q4_0", embedding_type=embedding_type, device="cpu",
        compute_dtype="float32",
    )  # fmt: skip
    before = loaded.logits([5, 6, 7])
    with pytest.raises(ValueError, match="quantized with gguf and is not serializable"):
        loaded.model.save_pretrained(tmp_path / "packed")
    dense = loaded.model.dequantize()
    assert type(dense.model.embed_tokens) is torch.nn.Embedding
    assert type(dense.lm_head) is torch.nn.Linear
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert torch.allclose(loaded.logits([5, 6, 7]), before, atol=1e-3)
