"""Against mlx itself, bit for bit, and against mlx-lm, both ways."""

import json
import re

import polyquant
import pytest
import torch
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model
from polyquant_mlx._decode import decode
from polyquant_mlx._quantize import encode
from polyquant_mlx.formats import FORMATS
from polyquant.testing.oracles import agree
from safetensors import safe_open

from .conftest import FAMILIES, LAYER, MIXTURES, TOKENS, load
from .library import greedy, load_model, logits, mx, to_mlx, to_torch, written_by_mlx_lm

SAME = 1e-4  # of the largest logit: float32, summed in another order


def matrices():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    yield weight
    yield weight * 1e-6
    yield weight.abs() * 300
    half = weight.clone()
    half[:, :128], half[3], half[5] = 0, 0, -0.25
    yield half


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_rounded_and_read_as_mlx_does(name, dtype):
    form = FORMATS[name]
    for matrix in matrices():
        weight = matrix.to(dtype)
        theirs = mx.quantize(to_mlx(weight), group_size=form.group_size, bits=form.bits, mode=form.mode)
        mine = encode(weight, form)
        for part, own in zip(theirs, mine.values(), strict=True):
            assert torch.equal(to_torch(part), own)
        numbers = to_torch(mx.dequantize(*theirs, group_size=form.group_size, bits=form.bits, mode=form.mode))
        found = decode(mine["weight"], mine["scales"], mine.get("biases"), form, numbers.dtype)
        agree("mlx", "mlx's dequantize", found, numbers)


@pytest.mark.parametrize("name", FAMILIES)
def test_mlx_lm_runs_what_is_written_and_its_files_are_read(name, family, tmp_path):
    loaded = load(family(name), scale_dtype="float32")
    written = loaded.save(tmp_path / "ours")
    theirs, _ = load_model(written)
    mine = loaded.logits(TOKENS).float()
    assert float((logits(theirs, TOKENS) - mine).abs().max()) <= SAME * float(mine.abs().max())
    own = loaded.model.generate(torch.tensor([TOKENS]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert greedy(theirs, TOKENS, 12) == own[0, len(TOKENS) :].tolist()

    model = written_by_mlx_lm(written, tmp_path / "theirs")
    read = load(tmp_path / "theirs")
    assert_verified(read)
    mine = read.logits(TOKENS).float()
    assert float((logits(model, TOKENS) - mine).abs().max()) <= SAME * float(mine.abs().max())
    routers = [note for note in read.notes if "is packed in the checkpoint, and held dense" in note]
    assert len(routers) == (2 if name in MIXTURES else 0)
    assert {layer.reason for layer in read.layers if not layer.quantized and layer.role == "embedding"} == set()
    again = load(read.save(tmp_path / "again"))
    assert torch.equal(again.logits(TOKENS), read.logits(TOKENS))


@pytest.mark.parametrize("options", [
    {"bits": 3, "group_size": 32}, {"bits": 5, "group_size": 128}, {"mode": "mxfp4", "group_size": None, "bits": None},
    {"mode": "nvfp4", "group_size": None, "bits": None}, {"mode": "mxfp8", "group_size": None, "bits": None},
], ids=lambda options: options.get("mode") or f"affine{options['bits']}")  # fmt: skip
def test_every_mode_of_mlx_lms_is_read(options, family, tmp_path):
    model = written_by_mlx_lm(load(family("qwen2")).save(tmp_path / "dense"), tmp_path / "theirs", **options)
    for kernel in ("library", "packed"):
        read = load(tmp_path / "theirs", kernel=kernel)
        assert_verified(read)
        theirs = logits(model, TOKENS)
        assert torch.equal(read.logits(TOKENS).argmax(1), theirs.argmax(1))
        scheme = options.get("mode") or f"affine{options['bits']}"
        assert {layer.scheme for layer in read.layers if layer.quantized} == {scheme}


def test_bits_may_be_mixed(family, tmp_path):
    chosen = {"layers.0.mlp.up_proj": "affine8-g32", "embed_tokens": "affine6-g64", "self_attn.v_proj": "mxfp4"}
    loaded = load(family("qwen3"), layers=chosen, scale_dtype="float32")
    schemes = {layer.name.removesuffix(".weight"): layer.scheme for layer in loaded.layers if layer.quantized}
    assert [schemes[name] for name in (LAYER, "model.embed_tokens", "model.layers.1.self_attn.v_proj", "lm_head")] == [
        "affine8", "affine6", "mxfp4", "affine4",
    ]  # fmt: skip
    written = loaded.save(tmp_path / "mixed")
    said = json.loads((written / "config.json").read_text())
    assert said["quantization"] == said["quantization_config"]
    assert said["quantization"][LAYER] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert "quant_method" not in said["quantization"]
    theirs, _ = load_model(written)
    for kernel in ("library", "packed"):
        read = load(written, kernel=kernel)
        assert_verified(read)
        assert {layer.name.removesuffix(".weight"): layer.scheme for layer in read.layers if layer.quantized} == schemes
        mine = read.logits(TOKENS).float()
        assert float((logits(theirs, TOKENS) - mine).abs().max()) <= 3e-2 * float(mine.abs().max())
    planned = polyquant.plan(written, "mlx", kernel="library")
    assert {plan.name: plan.stored_bytes for plan in planned.tensors} == {
        layer.name: layer.stored_bytes for layer in load(written).initial_layers
    }


def test_mixed_bits_of_experts_are_read_by_mlx_lms_names(family, tmp_path):
    def more(path, module):
        return {"bits": 6, "group_size": 64, "mode": "affine"} if path.endswith("down_proj") else True

    written = load(family("mixtral"), scale_dtype="float32").save(tmp_path / "ours")
    model = written_by_mlx_lm(written, tmp_path / "theirs", quant_predicate=more)
    read = load(tmp_path / "theirs")
    schemes = {layer.name: layer.scheme for layer in read.layers if layer.role == "experts"}
    assert schemes["model.layers.1.mlp.experts.down_proj"] == "affine6"
    assert schemes["model.layers.1.mlp.experts.gate_up_proj"] == "affine4"
    mine = read.logits(TOKENS).float()
    assert float((logits(model, TOKENS) - mine).abs().max()) <= SAME * float(mine.abs().max())


@pytest.mark.parametrize("model", MIXTURES)
@pytest.mark.parametrize("kernel", ["library", "packed"])
def test_a_mixture_in_4_bits_is_4_bits(model, kernel, family):
    loaded = load(family(model), kernel=kernel)
    found = polyquant.verify(loaded)
    assert found.passed
    assert found.memory.weights_stored_bytes <= 0.4 * found.memory.weights_bfloat16_bytes
    assert all(layer.quantized for layer in loaded.layers if layer.role in ("experts", "linear", "head", "embedding"))


def test_a_file_is_what_mlx_writes(checkpoint):
    with safe_open(checkpoint() / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "mlx"}
        tensors = {
            name.removeprefix(f"{LAYER}."): file.get_tensor(name) for name in file.keys() if name.startswith(LAYER)
        }
        assert not [name for name in file.keys() if name.endswith("uint8")]
    assert {name: (tuple(each.shape), each.dtype) for name, each in tensors.items()} == {
        "weight": ((512, 32), torch.uint32), "scales": ((512, 4), torch.bfloat16), "biases": ((512, 4), torch.bfloat16),
    }  # fmt: skip


def test_metal_is_read_as_transformers_reads_it(checkpoint, folder):
    from transformers import AutoModelForCausalLM
    from transformers.integrations.metal_quantization import _affine_quantize_tensor

    path = checkpoint(layout="metal", bits=8, scale_dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map="cpu"
    ).eval()  # dense, since this is no Mac
    read = load(path)
    assert read.config.layout == "metal"
    assert_verified(read)
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS])).logits[0]
    assert torch.allclose(read.logits(TOKENS), expected, atol=1e-3)
    weight = theirs.get_submodule(LAYER).weight
    assert torch.equal(read.model.get_submodule(LAYER).dequantize(), weight)
    with safe_open(tiny_model("llama", folder) / "model.safetensors", framework="pt") as file:
        dense = file.get_tensor(f"{LAYER}.weight")
    packed, scales, biases = _affine_quantize_tensor(dense, 64, 8)
    layer = read.model.get_submodule(LAYER)
    assert torch.equal(layer.weight.view(torch.uint32), packed)
    assert torch.equal(layer.scales, scales)
    assert torch.equal(layer.biases, biases)


def test_a_vocabulary_may_stay_dense(family, tmp_path):
    loaded = load(family("qwen2"), vocabulary="dense")
    assert [layer.quantized for layer in loaded.layers if layer.role == "embedding"] == [False]
    read = load(loaded.save(tmp_path / "out"))
    assert read.config.vocabulary == "dense"
    assert torch.equal(read.logits(TOKENS), loaded.logits(TOKENS))
    theirs, _ = load_model(tmp_path / "out")
    assert torch.equal(logits(theirs, TOKENS).argmax(1), read.logits(TOKENS).argmax(1))


def test_a_tied_head_has_the_tensors_of_its_embedding(family):
    model = load(family("qwen2")).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert re.search("tied to model.embed_tokens", str(load(family("qwen2")).layers)) is not None


def test_it_loads_in_bfloat16_too(checkpoint):
    loaded = load(checkpoint(), compute_dtype="bfloat16")
    theirs = logits(load_model(checkpoint())[0], TOKENS)
    assert float((loaded.logits(TOKENS).float() - theirs).abs().max()) <= 3e-2 * float(theirs.abs().max())
