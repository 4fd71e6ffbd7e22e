"""gpt-oss: experts stay packed, and are those of transformers' own conversion; dense models by OCP's rule."""

import json
from functools import partial

import polyquant
import pytest
import torch
from polyquant.errors import ModelError
from polyquant.plugin.layers import LinearExperts
from polyquant.testing.checkpoints import assert_verified, changed_copy, put, replaced, without
from polyquant.testing.models import tiny_model
from polyquant.testing.oracles import agree
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from .checkpoints import EXPERTS, MATRICES, TOKENS, gpt_oss, packed_gpt_oss

EXPERT = f"{EXPERTS.format(1)}.down_proj"


def load(path, **options):
    return polyquant.load(path, "mxfp4", device="cpu", **options)


@pytest.fixture(scope="module")
def dense_twin(folder):
    """transformers' model with the weights that its own conversion makes of the checkpoint."""
    _, made = packed_gpt_oss(folder)
    model = GptOssForCausalLM.from_pretrained(gpt_oss(folder), dtype=torch.float32)
    for layer in range(2):
        for name in MATRICES:
            whole = f"{EXPERTS.format(layer)}.{name}"
            weight = convert_moe_packed_tensors(made[f"{whole}_blocks"], made[f"{whole}_scales"], dtype=torch.float32)
            model.get_parameter(whole).data.copy_(weight)
    return model.eval()


@pytest.fixture
def changed(mxfp4_checkpoint, tmp_path):
    """The checkpoint with its tensors and its quantization_config changed by functions."""
    return partial(changed_copy, mxfp4_checkpoint, tmp_path)


@pytest.mark.parametrize("kernel", ["library", "packed"])
def test_experts_stay_packed_and_answer_as_the_dense_model(mxfp4_checkpoint, dense_twin, kernel):
    whole = {"embeddings": "keep", "head": "keep"}
    plan = polyquant.plan(mxfp4_checkpoint, "mxfp4", device="cpu", kernel=kernel, **whole)
    loaded = load(mxfp4_checkpoint, kernel=kernel, **whole)
    assert_verified(loaded)
    experts = [layer for layer in loaded.initial_layers if layer.role == "experts"]
    assert len(experts) == 4 and all(layer.quantized and layer.bits_per_weight < 5.2 for layer in experts)
    stored = sum(layer.stored_bytes for layer in loaded.initial_layers)
    assert stored == plan.weights_planned_bytes
    (coverage,) = (check for check in polyquant.verify(loaded, max_new_tokens=1).checks if check.name == "coverage")
    assert coverage.found == "100.0%"
    for layer in experts:
        weight = loaded.model.get_submodule(layer.name).dequantize()
        agree("mxfp4", "transformers' MXFP4 conversion", weight, dense_twin.get_parameter(layer.name))
    with torch.no_grad():
        expected = dense_twin(torch.tensor([TOKENS])).logits[0]
    tolerance = 1e-5 if kernel == "library" else 5e-3  # the packed kernels round activations
    assert float((loaded.logits(TOKENS) - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_transformers_own_forward_over_the_packed_experts_gives_the_same_bits(mxfp4_checkpoint, dense_twin):
    """Its own loop over experts, given what a stack decodes for each instead of a dense tensor."""
    experts = load(mxfp4_checkpoint, kernel="library").model.get_submodule(EXPERTS.format(0))
    theirs = dense_twin.get_submodule(EXPERTS.format(0))
    states = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 1], [2, 3], [1, 0]]).repeat(3, 1)
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(1))

    class Decoded(torch.nn.Module):
        """A dense tensor of experts, as far as the loop asks: one at a time."""

        def __init__(self, stack):
            super().__init__()
            self.stack = stack

        def __getitem__(self, number):
            return self.stack.expert(int(number)).dequantize().T.contiguous()

    for name in MATRICES:
        stack = getattr(experts, name)
        assert isinstance(stack, LinearExperts)
        delattr(experts, name)
        experts.add_module(name, Decoded(stack))
    loop = type(experts).forward.__wrapped__ if hasattr(type(experts).forward, "__wrapped__") else type(experts).forward
    with torch.no_grad():
        found, expected = (loop(each, states, index, weights) for each in (experts, theirs))
    assert float((found - expected).abs().max()) == 0.0


def test_what_is_saved_is_the_file_that_was_read_and_transformers_reads_it(mxfp4_checkpoint, dense_twin, tmp_path):
    loaded = load(mxfp4_checkpoint)
    saved = loaded.save(tmp_path / "saved")
    before, after = (load_file(path / "model.safetensors") for path in (mxfp4_checkpoint, saved))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    theirs = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    with torch.no_grad():
        found, expected = (each(torch.tensor([TOKENS])).logits for each in (theirs.eval(), dense_twin))
    assert torch.equal(found, expected)
    packed = load(mxfp4_checkpoint, kernel="packed").save(tmp_path / "packed")
    again = load_file(packed / "model.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_adapters_get_the_gradients_of_the_dense_model(mxfp4_checkpoint, dense_twin):
    from peft import LoraConfig, get_peft_model

    def gradients(model):
        torch.manual_seed(1)
        adapters = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        adapted, ids = get_peft_model(model, adapters).train(), torch.tensor([TOKENS])
        adapted(input_ids=ids, labels=ids).loss.backward()
        return {name: value.grad for name, value in adapted.named_parameters() if value.grad is not None}

    loaded = load(mxfp4_checkpoint, kernel="library")
    found = gradients(loaded.backend.prepare_for_training(loaded))
    twin = GptOssForCausalLM(dense_twin.config).float()
    twin.load_state_dict(dense_twin.state_dict())
    expected = gradients(twin)
    assert found and found.keys() == {name for name in expected if "lora" in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kernel", ["library", "packed"])
def test_a_dense_gpt_oss_is_quantized_on_the_fly(folder, tmp_path, kernel):
    loaded = load(gpt_oss(folder), kernel=kernel)
    assert_verified(loaded)
    assert {layer.role for layer in loaded.initial_layers if layer.quantized} == {"experts"}
    saved = loaded.save(tmp_path / "out")
    again = load(saved, kernel=kernel)
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))
    assert again.config == loaded.config
    theirs = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    name = f"{EXPERTS.format(0)}.gate_up_proj"
    assert torch.equal(loaded.model.get_submodule(name).dequantize(), theirs.get_parameter(name))


@pytest.mark.parametrize("kernel", ["library", "packed"])
def test_a_packed_model_is_made_dense_with_the_same_weights(mxfp4_checkpoint, dense_twin, kernel):
    model = load(mxfp4_checkpoint, kernel=kernel, embeddings="keep", head="keep").model.dequantize()
    own, expected = model.state_dict(), dense_twin.state_dict()
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
    with torch.no_grad():
        found, wanted = (one(torch.tensor([TOKENS])).logits for one in (model, dense_twin))
    assert torch.equal(found, wanted)


def test_linear_layers_too_where_asked(folder, tmp_path):
    loaded = load(gpt_oss(folder), linears="quantize")
    assert_verified(loaded)
    assert {layer.role for layer in loaded.initial_layers if layer.quantized} == {"experts", "linear"}
    saved = loaded.save(tmp_path / "out")
    assert not (saved / "model.safetensors").exists()  # transformers knows experts only, and would make up the others
    again = load(saved)
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))
    assert again.config == loaded.config


def test_a_mixture_is_a_third_of_bfloat16(folder):
    loaded = load(tiny_model("mixtral", folder), linears="quantize", kernel="library")
    assert_verified(loaded)
    report = polyquant.verify(loaded, max_new_tokens=1)
    quantized = [layer for layer in report.layers if layer.quantized]
    assert sum(layer.stored_bytes for layer in quantized) < 0.35 * sum(2 * layer.weights for layer in quantized)


def test_codes_are_ocps():
    """Against plain arithmetic in float64: each number to the nearest of the eight, ties to the even code."""
    from polyquant_mx._quantize import quantized
    from polyquant_mx.formats import MXFP4

    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)) * 3
    weight[0, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.1])
    weight[1], weight[2, :32] = 0, 7.99
    found = quantized(weight, MXFP4)
    blocks = weight.view(24, 3, 32).double()
    exponents = blocks.abs().amax(-1).log2().floor() - 2
    exponents[blocks.abs().amax(-1) == 0] = -127
    assert torch.equal(found["scales"].double() - 127, exponents)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    scaled = (blocks / torch.exp2(exponents)[..., None]).flatten(1)
    distances = (scaled.abs()[..., None] - levels).abs()
    nearest = distances.amin(-1, keepdim=True)
    candidates = distances == nearest
    even = candidates & (torch.arange(8) % 2 == 0)
    picked = torch.where(even.any(-1), even.int().argmax(-1), candidates.int().argmax(-1))
    codes = torch.stack([found["qweight"] & 15, found["qweight"] >> 4], -1).flatten(1)
    assert torch.equal(codes & 7, picked.to(torch.uint8))
    assert torch.equal(codes > 7, weight < 0)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (without(f"{EXPERT}_scales"), f"{EXPERT} cannot be read: _scales is missing; it has _blocks"),
        (without(f"{EXPERT}_blocks"), f"{EXPERT} cannot be read: _blocks is missing; it has _scales"),
        (replaced(f"{EXPERT}_blocks", lambda blocks: blocks[:-1]), "there are 4 experts, and _blocks has 3"),
        (replaced(f"{EXPERT}_scales", lambda scales: scales.repeat(2, 1, 1)), "there are 4 experts, and _scales has 8"),
        (replaced(f"{EXPERT}_scales", lambda scales: torch.full_like(scales, 255)), "255 to 255, and None to 254 is"),
        (replaced(f"{EXPERT}_blocks", lambda blocks: blocks[..., :8].contiguous()), "_blocks of a layer .* should be"),
        (replaced(f"{EXPERT}_bias", lambda bias: bias[:, :-1].contiguous()), "down_proj_bias has shape"),
    ],
)  # fmt: skip
def test_damaged_experts_are_refused_by_name(changed, tensors, words):
    with pytest.raises(ModelError, match=words):
        load(changed(tensors))


def test_a_config_without_its_tensors_and_tensors_without_their_config_are_refused(folder, changed, tmp_path):
    dense = load_file(gpt_oss(folder) / "model.safetensors")
    made = packed_gpt_oss(folder)[1]
    whole = {name: tensor for name, tensor in dense.items() if "experts" in name}
    with pytest.raises(ModelError, match="says that it is quantized with 'mxfp4', and no layer in its files has"):
        load(changed(put({**whole, **dict.fromkeys(made)})))
    path = changed()
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        load(path)
