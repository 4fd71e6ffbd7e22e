"""Fused experts in the packed layout: the library's weights, the model's own answers, planned, trained on, saved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polyquant
import pytest
import torch
from polyquant.errors import ConfigError, ModelError, SaveError
from polyquant.packed_weights.experts import RepackedExperts
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.testing.models import tiny_model

from . import zoo

pytestmark = pytest.mark.usefixtures("bitsandbytes")
KINDS = [
    "gpt_oss",  # (experts, in, out), biases, gates between the rows of up
    "granitemoe", "nemotron_h",  # no gate
    "deepseek_v3", "olmoe", "qwen3_moe",
]  # fmt: skip
TOKENS = list(range(20, 36))
WHOLE = {"embeddings": "keep", "head": "keep"}  # in the dtype that answers are compared in
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def mixtral(models: Path) -> Path:
    return tiny_model("mixtral", models)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, models: Path) -> Path:
    """A checkpoint of the architecture."""
    found = {kind: (config, model_class) for kind, config, model_class in zoo.configs([request.param])}
    if request.param not in found:
        pytest.skip(f"transformers builds no small {request.param} here")
    return zoo.build(*found[request.param], models / request.param)


def load(model: Path, **options: Any) -> Any:
    return polyquant.load(model, "bitsandbytes", device="cpu", **{"kernel": "packed", **WHOLE, **options})


def stacks(model: Any) -> dict[str, RepackedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RepackedExperts)}


def exact(model: Any) -> Iterator[Any]:
    """The packed modules of a model, made to round no activations."""
    for module in model.modules():
        if isinstance(module, (RepackedExperts, RepackedLinear)):
            module.activations = "float32"
            yield module


def test_experts_are_the_librarys_and_answer_as_the_dense_model_does(model: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from polyquant.loading.dense import load_dense
    from polyquant.models.resolve import resolve_dense

    plan = polyquant.plan(model, "bitsandbytes", kernel="packed", device="cpu", **WHOLE)
    loaded = load(model)
    packed, dense = stacks(loaded.model), load_dense(resolve_dense(str(model)))
    described = {layer.name: layer for layer in loaded.initial_layers}
    experts = [weight for weight in loaded.settled.weights if weight.role == "experts"]
    assert experts and set(packed) == {weight.name for weight in experts}
    assert plan.weights_planned_bytes == sum(layer.stored_bytes for layer in described.values())
    for name, stack in packed.items():
        layer, whole = described[name], dense.get_parameter(name).detach()
        assert (layer.role, layer.shape, layer.scheme, layer.bits) == ("experts", tuple(whole.shape), "nf4", 4)
        assert 4 < layer.bits_per_weight < 4.6 and layer.quantized
        for expert, matrix in enumerate(whole):
            rows = (matrix.T if stack.transposed else matrix).contiguous()
            theirs = dequantize_4bit(*quantize_4bit(rows, blocksize=64, quant_type="nf4"))
            assert torch.equal(stack.packed[expert].decode(), theirs)
    assert list(exact(loaded.model))
    answers = loaded.logits(TOKENS)
    whole = loaded.model.dequantize()
    assert not stacks(whole) and not any(isinstance(module, RepackedLinear) for module in whole.modules())
    with torch.inference_mode():
        expected = whole(input_ids=torch.tensor([TOKENS])).logits[0]
    assert (answers - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_gradients_are_those_of_the_dense_experts(model: Path) -> None:
    loaded = load(model)
    owner = next(iter(stacks(loaded.model))).rpartition(".")[0]
    experts = loaded.model.get_submodule(owner)
    assert list(exact(loaded.model))
    torch.manual_seed(0)
    inputs = torch.randn(7, loaded.model.config.hidden_size).requires_grad_()
    chosen = torch.stack([torch.randperm(experts.num_experts)[:2] for _ in range(7)])
    shares = torch.rand(7, 2).requires_grad_()

    def answered() -> list[torch.Tensor]:
        answer = experts(inputs, chosen, shares)
        return [answer.detach(), *torch.autograd.grad(answer.square().sum(), (inputs, shares))]

    packed = answered()
    loaded.model.dequantize()
    for mine, dense in zip(packed, answered(), strict=True):
        assert (mine - dense).abs().max() <= 1e-4 * dense.abs().max().clamp(min=1e-6)


def test_numbers_beyond_the_experts_stand_for_none(mixtral: Path) -> None:
    experts = load(mixtral).model.model.layers[0].mlp.experts
    inputs, none = torch.randn(3, 256), torch.full((3, 2), 4)
    shares = torch.ones(3, 2)
    assert torch.equal(experts(inputs, none, shares), torch.zeros(3, 256))
    assert experts(inputs[:0], none[:0], shares[:0]).shape == (0, 256)
    one = torch.tensor([[4, 1]] * 3)
    assert torch.allclose(experts(inputs, one, shares), experts(inputs, one[:, 1:], shares[:, 1:]))


def test_the_option_says_when(mixtral: Path, models: Path) -> None:
    packed = load(mixtral)
    assert polyquant.verify(packed).passed
    assert len(stacks(packed.model)) == 4
    told = "fused experts stay dense: kernel='packed' quantizes them"
    for options in ({"experts": "keep"}, {"kernel": "library"}, {"skip": ("experts",)}):
        loaded = load(mixtral, **options)
        assert any(told in note for note in loaded.notes) == (options == {"kernel": "library"})
        assert not stacks(loaded.model)
        assert not any(layer.quantized for layer in loaded.layers if layer.role == "experts")
    beside = load(mixtral, kernel="library", experts="quantize", compute_dtype="float32")
    assert len(stacks(beside.model)) == 4 and polyquant.verify(beside).passed
    assert not any(isinstance(module, RepackedLinear) for module in beside.model.modules())
    assert (beside.logits(TOKENS) - packed.logits(TOKENS)).abs().max() < 0.2  # some processors multiply in bfloat16
    with pytest.raises(ConfigError, match="this model has no fused experts that are not skipped: leave experts out"):
        polyquant.plan(tiny_model("llama", models), "bitsandbytes", experts="quantize", device="cpu")
    with pytest.raises(ConfigError, match="experts are for a CPU so far, and this is cuda:0"):
        polyquant.plan(mixtral, "bitsandbytes", experts="quantize", device="cuda:0")


def test_experts_of_another_kind_stay_dense_with_their_reason(models: Path) -> None:
    """Llama 4 multiplies all of them at once, in code of its own."""
    found = list(zoo.configs(["llama4_text"]))
    if not found:
        pytest.skip("transformers builds no small llama4_text here")
    model = zoo.build(*found[0][1:], models / "llama4")
    loaded = load(model)
    left = [layer for layer in loaded.layers if layer.role == "experts"]
    assert left and not any(layer.quantized for layer in left) and all(layer.reason for layer in left)
    with pytest.raises(ConfigError, match=r"gate_up_proj is of Llama4TextExperts .*no place in the packed layout"):
        polyquant.plan(model, "bitsandbytes", experts="quantize", device="cpu")


def test_a_saved_model_has_dense_experts_that_are_packed_again(mixtral: Path, tmp_path: Path) -> None:
    loaded = load(mixtral)
    saved = loaded.save(tmp_path / "saved")
    again = load(saved)
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))
    assert load(again.save(tmp_path / "twice")).logits(TOKENS).equal(loaded.logits(TOKENS))
    assert not stacks(load(saved, kernel="library").model)


def test_experts_that_have_changed_are_not_saved(mixtral: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(mixtral, tmp_path / "model"))
    loaded = load(model)
    _change(model, lambda tensor: tensor[3].add_(1))
    with pytest.raises(SaveError, match=r"layers\.1\.mlp\.experts\.down_proj is another weight now"):
        loaded.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_damaged_expert_is_named(mixtral: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(mixtral, tmp_path / "model"))
    _change(model, lambda tensor: tensor[0, 0].fill_(torch.nan))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.down_proj: expert 2 holds NaN or infinity"):
        load(model)


@pytest.mark.parametrize("backend", ["bitsandbytes", "gguf"])
def test_a_checkpoint_of_16_bits_gives_what_the_same_in_32_bits_does(
    mixtral: Path, tmp_path: Path, backend: str
) -> None:
    from safetensors.torch import load_file, save_file

    if polyquant.backend(backend).problems("cpu"):
        pytest.skip(f"{backend} does not run here")
    half = {name: tensor.bfloat16() for name, tensor in load_file(mixtral / "model.safetensors").items()}
    answers = []
    for dtype in (torch.bfloat16, torch.float32):
        model = Path(shutil.copytree(mixtral, tmp_path / str(dtype)))
        tensors = {name: tensor.to(dtype) for name, tensor in half.items()}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        answers.append(polyquant.load(model, backend, kernel="packed", device="cpu", **WHOLE).logits(TOKENS))
    assert torch.equal(*answers)


def _change(model: Path, change: Any) -> None:
    """One expert's matrix in a checkpoint, which stores each by itself."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
    (name,) = [name for name in tensors if "layers.1." in name and "experts.2.w2" in name]
    change(tensors[name])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_adapters_train_on_frozen_experts(mixtral: Path) -> None:
    from peft import LoraConfig, get_peft_model

    loaded = load(mixtral)
    before = {name: stack.qweight.clone() for name, stack in stacks(loaded.model).items()}
    model = get_peft_model(
        loaded.backend.prepare_for_training(loaded), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    ).train()
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer, ids, losses = torch.optim.Adam(trained, lr=1e-2), torch.arange(5, 45)[None], []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    first = [tensor for name, tensor in model.named_parameters() if "layers.0" in name and "lora_B" in name]
    assert first and all(tensor.grad.abs().sum() > 0 for tensor in first)  # through the experts of layer 0
    assert all(stack.qweight.equal(before[name.removeprefix("base_model.model.")])
               for name, stack in stacks(model).items())  # fmt: skip


def test_it_compiles_and_copies(mixtral: Path) -> None:
    import copy

    loaded = load(mixtral)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = loaded.model(ids).logits
        twin = copy.deepcopy(loaded.model)
        del loaded
        assert torch.equal(twin(ids).logits, expected)
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(twin, backend="eager")(ids).logits, expected, atol=1e-4)
