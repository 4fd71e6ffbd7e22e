"""`polyquant convert` from GPTQ and AWQ: the tensors that other formats have for the same codes, each by an oracle."""

import polyquant
import pytest
import torch
from polyquant.errors import ConversionRefused
from polyquant.measure.quality.divergence import kl_divergence
from polyquant.testing.models import tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

UP = "model.layers.1.mlp.up_proj"
TOKENS = list(range(5, 69))


def decoded(path):
    """Weights by the names of their layers, as the reader of the format gives them to the packed runtime."""
    loaded = polyquant.load(path, device="cpu", kernel="packed")
    names = [layer.name.rpartition(".")[0] for layer in loaded.layers if layer.quantized]
    return {name: loaded.model.get_submodule(name).dequantize() for name in names}


@pytest.fixture
def written(folder, packing, tmp_path):
    """A GPTQ checkpoint with some variant."""

    def make(model="llama", method="gptq", **variant):
        return packing.writers[method](tiny_model(model, folder), tmp_path / "source", **variant)

    return make


@pytest.mark.parametrize(
    ("source", "variant", "target", "same"),
    [
        ("gptq", {"group_size": 64}, "awq", {"zero_point": False}),
        ("awq", {"group_size": 32}, "gptq", {"group_size": 32, "sym": False, "layout": "gptq_v2"}),
        ("awq", {"group_size": -1, "zero_point": False}, "gptq", {"group_size": -1}),
    ],
)
def test_gptq_and_awq_hold_each_others_codes(folder, packing, written, tmp_path, source, variant, target, same):
    """The very tensors that the format's writer makes of the same weights."""
    conversion = polyquant.convert(written(method=source, **variant), target, tmp_path / "out")
    assert conversion.exact and len(conversion.layers) == 14 and conversion.target_backend == target
    expected = packing.writers[target](tiny_model("llama", folder), tmp_path / "expected", **same)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_round_trip_without_zero_points(packing, written, tmp_path, model):
    """GPTQ, compressed-tensors, GGUF Q4_1 and back: bit-equal everywhere, in groups that got smaller for GGUF."""
    pytest.importorskip("polyquant_compressed_tensors")
    pytest.importorskip("polyquant_gguf")
    source = written(model, group_size=64)
    dense = packing.equal_dense(source)
    for number, target in enumerate(["compressed-tensors", "gguf:type=Q4_1", "awq", "gguf", "gptq"]):
        conversion = polyquant.convert(source, target, tmp_path / str(number))
        assert conversion.exact, target
        source = tmp_path / str(number)
        for name, weight in decoded(source).items():
            assert torch.equal(weight, dense.get_submodule(name).weight), (target, name)
    assert conversion.options["group_size"] == 32 and conversion.options["sym"] is True
    with torch.inference_mode():
        expected = dense(torch.tensor([TOKENS])).logits[0]
    again = polyquant.load(source, device="cpu", kernel="packed")
    torch.testing.assert_close(again.logits(TOKENS), expected, rtol=1e-2, atol=1e-2)


def test_round_trip_with_zero_points(written, tmp_path):
    """Q4_1 rounds minima to float16, which is stated; from there, zero points are the very ones that they were."""
    pytest.importorskip("polyquant_compressed_tensors")
    pytest.importorskip("polyquant_gguf")
    source = written(group_size=32, sym=False)
    first = polyquant.convert(source, "compressed-tensors", tmp_path / "vllm")
    second = polyquant.convert(tmp_path / "vllm", "gguf", tmp_path / "gguf")
    third = polyquant.convert(tmp_path / "gguf", "gptq", tmp_path / "back")
    assert first.exact and second.options["type"] == "Q4_1"
    assert 0 < second.largest_relative_difference < 2**-10 and not third.exact
    ours, theirs = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    for part in ("qweight", "scales", "g_idx"):
        assert torch.equal(ours[f"{UP}.{part}"], theirs[f"{UP}.{part}"]), part
    before, after = decoded(source), decoded(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_others_read_what_is_written(packing, written, tmp_path):
    """transformers with compressed-tensors' library, and with the gguf package: the weights that they make of it."""
    pytest.importorskip("polyquant_compressed_tensors")
    pytest.importorskip("polyquant_gguf")
    source = written(group_size=64)
    expected = packing.equal_dense(source).state_dict()
    polyquant.convert(source, "compressed-tensors", tmp_path / "vllm")
    polyquant.convert(source, "gguf", tmp_path / "gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "vllm", dtype=torch.float32)
    with torch.inference_mode():
        found = theirs(torch.tensor([TOKENS])).logits  # it decompresses itself for its first forward pass
    for name, tensor in theirs.state_dict().items():
        if name in expected:
            assert torch.equal(tensor.float(), expected[name]), name
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.state_dict().items())
    with torch.inference_mode():
        torch.testing.assert_close(found, packing.equal_dense(source)(torch.tensor([TOKENS])).logits)


@pytest.mark.parametrize("sym", [True, False])
def test_llama_cpp_runs_it(packing, written, tmp_path, sym):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("polyquant_gguf")
    source = written(group_size=64, sym=sym)
    with torch.inference_mode():
        expected = packing.equal_dense(source)(torch.tensor([TOKENS])).logits[0]
    polyquant.convert(source, "gguf", tmp_path / "out")
    loaded = polyquant.load(tmp_path / "out" / "model.gguf", "llama-cpp", kv_cache_type="F32", flash_attention="off")
    found = torch.as_tensor(loaded.logits(TOKENS))
    assert float(kl_divergence(expected, found).mean()) < 1e-3


@pytest.mark.parametrize(
    ("variant", "target", "trait", "elsewhere"),
    [
        ({"order": True, "group_size": 64}, "awq", "act-order of 14 layers", "gptq"),
        ({"order": True, "group_size": 64}, "gguf", "act-order of 14 layers", "gptq"),
        ({"order": True, "group_size": 64}, "compressed-tensors", "act-order of 14 layers", "gptq"),
        ({"bits": 3, "group_size": 32}, "awq", "bits of 14 layers", None),
        ({"bits": 8, "group_size": 64}, "awq", "bits of 14 layers", "compressed-tensors"),
        ({"bits": 8, "group_size": 64, "sym": False}, "gguf", "zero points of 14 layers", "compressed-tensors"),
        ({"group_size": 16}, "gguf", "group size of 14 layers", "compressed-tensors"),
        ({"group_size": 64, "sym": False}, "gguf:type=Q4_0", "zero points of 14 layers", None),
        ({"group_size": 64, "sym": False}, "awq:zero_point=false", "zero points of 14 layers", None),
        ({"group_size": 64}, "awq:group_size=128", "group size of 14 layers", None),
    ],
)
def test_what_has_no_place_is_named(written, tmp_path, variant, target, trait, elsewhere):
    """Which property, of which layers, and what would do; nothing is written."""
    pytest.importorskip("polyquant_compressed_tensors")
    pytest.importorskip("polyquant_gguf")
    with pytest.raises(ConversionRefused) as refused:
        polyquant.convert(written(**variant), target, tmp_path / "out")
    said = str(refused.value)
    assert trait in said and "model.layers.0.self_attn.q_proj" in said and "--requantize" in said
    assert elsewhere in (None, "gptq") or elsewhere in said
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_options_given_by_hand(written, tmp_path):
    """Smaller groups repeat scales, and zero points in the middle are held where fitted ones are."""
    source = written(group_size=64)
    conversion = polyquant.convert(source, "gptq:group_size=32,sym=false", tmp_path / "out")
    assert conversion.exact and conversion.options["group_size"] == 32 and conversion.options["sym"] is False
    before, after = decoded(source), decoded(tmp_path / "out")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_act_order_is_held_by_gptq(written, tmp_path):
    source = written(group_size=64, order=True)
    assert polyquant.convert(source, "gptq:sym=false", tmp_path / "out").exact
    assert torch.equal(decoded(source)[UP], decoded(tmp_path / "out")[UP])
