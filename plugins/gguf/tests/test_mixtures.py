"""Mixtures of experts in GGUF files: read packed as llama.cpp's converter lays them out, written, run by llama.cpp."""

import polyquant
import pytest
import torch
import transformers
from polyquant.errors import ModelError
from polyquant.loading.dense import load_dense
from polyquant.models.resolve import resolve_dense
from polyquant.plugin.gguf import read_header
from polyquant.plugin.layers import LinearExperts
from polyquant.testing.gguf_files import rewritten_gguf
from polyquant.testing.models import tiny_model

from .conftest import MIXTURES, tiny, write_gguf

IDS = [5, 17, 40, 3, 3, 88, 21, 60]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 384}


def logits(model):
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0].float()


def divergence(one, other):
    """Mean KL(one || other), in nats."""
    first, second = one.log_softmax(-1), other.log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())


def in_llama_cpp(folder, **more):
    path = next(folder.glob("*.gguf"))
    return polyquant.load(path, "llama-cpp", kv_cache_type="F32", flash_attention="off", **more)


@pytest.fixture
def dense(request, tmp_path):
    """A checkpoint of a mixture whose routers are of one mind, so that rounding sends no token to another expert."""
    model = tiny(request.param, tie_word_embeddings=False, **WIDE)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, tensor in model.named_parameters():
            if tensor.dim() > 1:
                tensor.normal_(std=(0.5 if name.startswith("lm_head") else 1) * tensor.shape[-1] ** -0.5)
            if ".gate.weight" in name or ".router.weight" in name:
                tensor.mul_(16)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "dense")
    transformers.AutoTokenizer.from_pretrained(tiny_model("llama", tmp_path)).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_each_is_the_model_it_was_made_of(architecture, kind, tmp_path):
    made_of = tiny(architecture, tie_word_embeddings=False)
    path = write_gguf(tmp_path / "model.gguf", made_of, architecture, kind)
    loaded = polyquant.load(path, "gguf", allow_dequantize=kind == "F32", kernel="library")
    if kind == "F32":
        torch.testing.assert_close(logits(loaded.model), logits(made_of), rtol=1e-5, atol=1e-5)
        return
    stacks = [module for module in loaded.model.modules() if isinstance(module, LinearExperts)]
    assert len(stacks) == 4
    assert all(module.weight.dtype == torch.uint8 for module in stacks)
    assert polyquant.verify(loaded).passed
    assert polyquant.verify(loaded).memory.weights_stored_bytes < 1.1 * path.stat().st_size
    whole = loaded.model.dequantize()
    for name, tensor in made_of.named_parameters():
        if ".experts." in name:
            assert (whole.get_parameter(name) - tensor).abs().max() < 0.01 * tensor.abs().max(), name


@pytest.mark.parametrize("dense", MIXTURES, indirect=True)
def test_written_it_is_read_and_run_by_llama_cpp(dense, tmp_path):
    pytest.importorskip("llama_cpp")
    loaded = polyquant.load(dense, "gguf", type="Q8_0", kernel="library", device="cpu")
    report = polyquant.verify(loaded)
    assert report.passed, report.failures
    out = loaded.save(tmp_path / "out")
    again = polyquant.load(out, kernel="library")
    assert torch.equal(again.logits(IDS), loaded.logits(IDS))
    packed = polyquant.load(out, kernel="packed", embeddings="keep", head="keep")
    assert polyquant.verify(packed).passed
    assert divergence(loaded.logits(IDS), packed.logits(IDS)) < 1e-4
    theirs = in_llama_cpp(out)
    assert divergence(loaded.logits(IDS), torch.as_tensor(theirs.logits(IDS))) < 1e-3  # it rounds activations
    assert (again.save(tmp_path / "more") / "model.gguf").read_bytes() == (out / "model.gguf").read_bytes()


@pytest.mark.parametrize("dense", MIXTURES, indirect=True)
def test_written_dense_it_gives_the_same_tokens_in_llama_cpp(dense, tmp_path):
    pytest.importorskip("llama_cpp")
    skip = ("layers", "lm_head")
    loaded = polyquant.load(dense, "gguf", kernel="library", device="cpu", skip=skip, allow_dequantize=True)
    theirs = in_llama_cpp(loaded.save(tmp_path / "out"), allow_dequantize=True)
    assert divergence(loaded.logits(IDS), torch.as_tensor(theirs.logits(IDS))) < 1e-5
    texts = [one.generate("The lake", max_new_tokens=16, do_sample=False) for one in (loaded, theirs)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dense", ["mixtral", "gpt-oss"], indirect=True)
def test_experts_that_are_skipped_are_written_dense(dense, tmp_path):
    loaded = polyquant.load(dense, "gguf", type="Q4_0", skip=("experts",), kernel="library", device="cpu")
    out = loaded.save(tmp_path / "out")
    entries = read_header(out / "model.gguf").tensors
    assert entries["blk.0.ffn_up_exps.weight"].type.name == "F32"
    assert torch.equal(polyquant.load(out, kernel="library").logits(IDS), loaded.logits(IDS))


def test_a_dense_mixture_is_what_llama_cpps_layout_says(tmp_path):
    """The reader is held against the converter's layout above, and the writer against the reader's dense model here."""
    folder = tiny_model("mixtral", tmp_path)
    out = polyquant.quantize(folder, "gguf", tmp_path / "out", type="Q8_0", device="cpu")
    answers, expected = polyquant.load(out).logits(IDS), logits(load_dense(resolve_dense(folder)))
    assert divergence(expected, answers) < 0.05


@pytest.mark.parametrize("dense", ["gpt-oss"], indirect=True)
def test_gpt_oss_in_mxfp4_becomes_a_gguf(dense, tmp_path):
    """Attention stays dense, as it is there; experts keep their codes, whose order in a block is another."""
    pytest.importorskip("polyquant_mx")
    source = polyquant.quantize(dense, "mxfp4", tmp_path / "mxfp4", device="cpu")
    before = polyquant.load(source, kernel="library", device="cpu", compute_dtype="float32")
    conversion = polyquant.convert(source, "gguf", tmp_path / "out")
    assert conversion.exact
    assert conversion.options["type"] == "MXFP4"
    after = polyquant.load(tmp_path / "out", kernel="library", device="cpu")
    assert read_header(tmp_path / "out" / "model.gguf").tensors["blk.0.ffn_up_exps.weight"].type.name == "MXFP4"
    assert divergence(before.logits(IDS), after.logits(IDS)) < 1e-6
    pytest.importorskip("llama_cpp")
    assert divergence(after.logits(IDS), torch.as_tensor(in_llama_cpp(tmp_path / "out").logits(IDS))) < 1e-3


@pytest.mark.parametrize("dense", ["qwen3moe"], indirect=True)
def test_experts_may_have_a_type_of_their_own(dense, tmp_path):
    loaded = polyquant.load(
        dense, "gguf", type="Q8_0", layers={"layers.*.mlp.experts": "Q4_0"}, kernel="library", device="cpu"
    )
    assert polyquant.verify(loaded).passed
    out = loaded.save(tmp_path / "out")
    types = {name: entry.type.name for name, entry in read_header(out / "model.gguf").tensors.items()}
    assert (types["blk.0.ffn_down_exps.weight"], types["blk.0.attn_q.weight"]) == ("Q4_0", "Q8_0")
    assert torch.equal(polyquant.load(out, kernel="library").logits(IDS), loaded.logits(IDS))


@pytest.mark.parametrize(
    ("changes", "kinds", "message"),
    [
        ({"qwen3moe.expert_used_count": None}, {}, "qwen3moe.expert_used_count is missing, a number was expected"),
        ({"qwen3moe.expert_feed_forward_length": 64}, {}, "has the shape .* its metadata say"),
        ({"qwen3moe.expert_count": 5}, {}, "has the shape .* its metadata say"),
        ({}, {"blk.0.ffn_up_exps.weight": None}, "lacks 1 tensors of the model: model.layers.0.mlp.experts.gate_up"),
        ({}, {"blk.1.ffn_gate_exps.weight": "Q4_0"}, "ffn_gate_exps.weight is Q4_0 and .* Q8_0; .* have one type"),
        ({}, {"blk.1.ffn_gate_inp.weight": "Q8_0"}, "ffn_gate_inp.weight is Q8_0, and numbers are expected"),
    ],
)
def test_files_that_are_not_whole_are_refused(tmp_path, changes, kinds, message):
    from gguf import GGMLQuantizationType, dequantize, quants

    def changed(tensor):
        kind = kinds.get(tensor.name, tensor.tensor_type.name)
        if kind in (None, tensor.tensor_type.name):
            return None if kind is None else (tensor.data, tensor.tensor_type)
        numbers = dequantize(tensor.data, tensor.tensor_type)
        return quants.quantize(numbers, GGMLQuantizationType[kind]), GGMLQuantizationType[kind]

    path = write_gguf(tmp_path / "whole.gguf", tiny("qwen3moe", tie_word_embeddings=False), "qwen3moe", "Q8_0")
    broken = rewritten_gguf(path, tmp_path / "broken.gguf", changes, changed)
    with pytest.raises(ModelError, match=message):
        polyquant.load(broken, "gguf")
