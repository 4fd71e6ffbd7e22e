"""Mixtures in ModelOpt's and transformers' formats: experts stacked, or held one by one as exports have them."""

from functools import partial

import polyquant
import pytest
import torch
from polyquant.errors import ModelError
from polyquant.plugin.layers import LinearExperts
from polyquant.testing.checkpoints import assert_verified, changed_copy, put, replaced, without
from polyquant.testing.models import tiny_model
from polyquant_mx import formats
from polyquant_mx._quantize import quantized
from safetensors.torch import load_file, save_file

from .checkpoints import TOKENS

EXPERTS = "model.layers.{}.mlp.experts"
NAMES = {"w1": "gate", "w3": "up", "w2": "down"}
FORMATS = {
    "NVFP4": (formats.NVFP4, ("weight", "weight_scale", "weight_scale_2")), "FP8": (formats.FP8, ("weight", "weight_scale")),
    "W4A16_AWQ": (formats.INT4, ("weight", "weight_scale")), "FP8_PB_WO": (formats.FP8_BLOCK, ("weight", "weight_scale")),
}  # fmt: skip


def load(path, **options):
    return polyquant.load(path, "modelopt", device="cpu", **options)


@pytest.fixture(scope="module", params=FORMATS)
def one_by_one(request, folder):
    """(a Mixtral whose experts are quantized one by one under the names of its hub checkpoint, their dense weights)."""
    scheme, names = FORMATS[request.param]
    out, dense = folder / f"single-{request.param}", tiny_model("mixtral", folder)
    stacked = load(dense, quant_algo=request.param).save(folder / f"stacked-{request.param}")
    changed_copy(stacked, out)
    tensors, weights = load_file(stacked / "packed.safetensors"), {}
    held = load_file(dense / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        del tensors[name]
    for name in [name for name in held if ".experts." in name and ".w" in name]:
        parts = quantized(held[name], scheme)
        layer = name.removesuffix(".weight")
        for short, stored in zip(("qweight", "scales", "outer_scale"), names, strict=False):
            whole = parts[short].reshape(()) if parts[short].numel() == 1 else parts[short]
            tensors[f"{layer}.{stored}"] = whole.contiguous()
        weights[layer] = held[name]
    save_file(tensors, out / "packed.safetensors", {"format": "pt"})
    return out, weights, stacked


def test_experts_that_are_held_one_by_one_stay_packed(one_by_one, tmp_path):
    path, weights, _ = one_by_one
    assert len(weights) == 24
    loaded = load(path, kernel="library")
    assert_verified(loaded)
    for layer in range(2):
        stack = loaded.model.get_submodule(f"{EXPERTS.format(layer)}.gate_up_proj")
        assert isinstance(stack, LinearExperts) and stack.count == 4
    packed = load(path, kernel="packed")
    assert_verified(packed)
    whole = loaded.model.get_submodule(f"{EXPERTS.format(1)}.gate_up_proj").dequantize()
    again = packed.model.get_submodule(f"{EXPERTS.format(1)}.gate_up_proj").dequantize()
    torch.testing.assert_close(again, whole, rtol=1e-6, atol=0)
    before, after = (load_file(each / "packed.safetensors") for each in (path, loaded.save(tmp_path / "out")))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)
    assert torch.equal(load(tmp_path / "out").logits(TOKENS), loaded.logits(TOKENS))


def test_each_expert_is_its_own_weight(one_by_one):
    path, weights, _ = one_by_one
    loaded = load(path, kernel="library")
    held = {name.replace("block_sparse_moe", "mlp"): weight for name, weight in weights.items()}
    stack = loaded.model.get_submodule(f"{EXPERTS.format(0)}.gate_up_proj")
    down = loaded.model.get_submodule(f"{EXPERTS.format(0)}.down_proj")
    for number in range(4):
        gate, up = stack.expert(number).dequantize().chunk(2)
        for name, found in (("w1", gate), ("w3", up), ("w2", down.expert(number).dequantize())):
            weight = held[f"{EXPERTS.format(0)}.{number}.{name}"]
            assert float((found - weight).norm() / weight.norm()) < 0.16, (number, name)


def test_missing_experts_are_refused_by_name(one_by_one, tmp_path):
    path, weights, _ = one_by_one
    layer = next(name for name in weights if name.endswith(".2.w3"))
    change = partial(changed_copy, path, tmp_path)
    for short in ("weight_scale", "weight"):
        with pytest.raises(ModelError, match=f"expert 2: {short} of one of its matrices is missing"):
            load(change(without(f"{layer}.{short}")))
    last = [name for name in load_file(path / "packed.safetensors") if ".experts.3." in name and ".layers.0." in name]
    with pytest.raises(ModelError, match="its experts should be 0 to 3, and expert 3 is missing"):
        load(change(put(dict.fromkeys(last))))


def test_stacked_experts_round_trip_and_damage_is_named(one_by_one, tmp_path):
    _, _, stacked = one_by_one
    loaded = load(stacked)
    again = load(loaded.save(tmp_path / "again"))
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))
    name = f"{EXPERTS.format(1)}.down_proj"
    with pytest.raises(ModelError, match=f"{name} cannot be read: there are 4 experts, and _weight_scale has 3"):
        load(changed_copy(stacked, tmp_path / "damaged", replaced(f"{name}_weight_scale", lambda scale: scale[:-1])))


def test_transformers_reads_our_mxfp8(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    loaded = polyquant.load(tiny_model("qwen2", folder), "mxfp8", device="cpu")
    assert_verified(loaded)
    theirs = AutoModelForCausalLM.from_pretrained(loaded.save(tmp_path / "out"), dtype=torch.float32)
    for layer in loaded.initial_layers:
        if layer.quantized:
            weight = loaded.model.get_submodule(layer.name.removesuffix(".weight")).dequantize()
            assert torch.equal(theirs.get_parameter(layer.name), weight)
