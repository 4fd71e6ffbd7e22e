"""Embeddings and heads that stay dense in 16 bits beside packed weights: the checkpoint's numbers, and plain modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polyquant
import pytest
import torch
from polyquant.errors import ConfigError, ModelError
from polyquant.measure.quality.divergence import kl_divergence
from polyquant.packed_weights import kernels
from polyquant.packed_weights.half import HalfEmbedding, HalfLinear
from polyquant.testing.checkpoints import changed_copy
from polyquant.testing.models import tiny_model
from torch import nn
from torch.nn import functional

from . import zoo

pytestmark = pytest.mark.usefixtures("bitsandbytes")
DTYPES = [torch.bfloat16, torch.float16]
TOKENS = list(range(5, 45))
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def load(model: Path, **options: Any) -> Any:
    return polyquant.load(model, "bitsandbytes", **{"device": "cpu", "kernel": "packed", **options})


def stored_in(model: Path, dtype: torch.dtype, out: Path) -> Path:
    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    return changed_copy(model, out, cast)


# ---- the product


@pytest.mark.parametrize("on_kernels", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (61, 64), (5, 32), (64, 90)])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 97])
def test_products_are_those_of_the_numbers(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, count: int, dtype: torch.dtype, on_kernels: bool
) -> None:
    if not on_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(rows, columns).to(dtype)), nn.Parameter(torch.randn(rows))
    layer = HalfLinear(weight, bias).requires_grad_(requires_grad=False)
    inputs = torch.randn(count, columns)
    exact = functional.linear(inputs.double(), weight.double(), bias.double())
    assert layer(inputs).dtype == torch.float32 and torch.allclose(layer(inputs).double(), exact, atol=2e-5)
    assert torch.equal(layer(inputs[None])[0], layer(inputs))
    with torch.inference_mode():
        narrow = layer(inputs.bfloat16())
    assert narrow.dtype == torch.bfloat16 and torch.allclose(narrow.double(), exact, atol=0.3, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_modules_that_are_cast_answer_in_what_they_were_cast_to(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    embedding = HalfEmbedding(nn.Parameter(torch.randn(32, 32).half(), requires_grad=False), torch.float32, None)
    head = HalfLinear(embedding.weight, None)
    ids = torch.arange(5)
    before = head(embedding(ids))
    both = nn.ModuleList([embedding, head]).to(dtype)
    after = both[1](both[0](ids))
    assert after.dtype == dtype and torch.allclose(after.float(), before, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("trains", ["inputs", "weight"])
def test_gradients_are_those_of_the_numbers(trains: str) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(40, 32).bfloat16(), requires_grad=trains == "weight")
    inputs = torch.randn(6, 32, requires_grad=True)
    HalfLinear(weight, None)(inputs).square().sum().backward()
    found = (inputs.grad, weight.grad)
    other, plain = inputs.detach().clone().requires_grad_(), weight.detach().float().requires_grad_()
    functional.linear(other, plain).square().sum().backward()
    assert (
        found[0] is not None and other.grad is not None and torch.allclose(found[0], other.grad, rtol=1e-4, atol=1e-3)
    )
    if trains == "weight":
        assert found[1] is not None and plain.grad is not None
        assert torch.allclose(found[1].float(), plain.grad, rtol=0.01, atol=0.05)


def test_torch_compile_sees_one_graph() -> None:
    torch.manual_seed(0)
    layer = HalfLinear(nn.Parameter(torch.randn(64, 32).half(), requires_grad=False), None)
    inputs = torch.randn(3, 32)
    with torch.inference_mode():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(inputs), layer(inputs))


# ---- loaded


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_packed_models_hold_them_as_their_checkpoint_does(
    models: Path, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    model = stored_in(tiny_model(name, models), dtype, tmp_path / "model")
    loaded, whole = load(model), load(model, embeddings="keep", head="keep")
    half = "float16" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    found = {layer.role: layer for layer in loaded.layers if layer.role in ("embedding", "head")}
    assert all((layer.scheme, layer.quantized) == (half, False) for layer in found.values())
    report = polyquant.verify(loaded)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert polyquant.plan(model, "bitsandbytes", kernel="packed", device="cpu").weights_planned_bytes == sum(
        layer.stored_bytes for layer in loaded.layers
    )
    said = [note for note in loaded.notes if "rounded from" in note]
    if dtype == torch.float32:
        assert f"{EMBEDDING} is kept in float16, rounded from float32: embeddings='keep' keeps it as it is" in said
        assert 0 < kl_divergence(whole.logits(TOKENS), loaded.logits(TOKENS)).mean() < 1e-5
    else:
        assert not said
        assert torch.allclose(loaded.logits(TOKENS), whole.logits(TOKENS), rtol=1e-5, atol=1e-5)
    again = load(loaded.save(tmp_path / "saved"))
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))
    for dense in (loaded.model.dequantize(), loaded.model):
        assert type(dense.get_input_embeddings()) is nn.Embedding and type(dense.get_output_embeddings()) is nn.Linear
        tied = dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
        assert tied is (name == "llama-tied")


def test_what_is_saved_is_the_checkpoints_own_where_nothing_changed(models: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    model, written = tiny_model("llama", models), []
    for kernel in ("packed", "library"):
        saved = load(model, kernel=kernel, compute_dtype="float32").save(tmp_path / kernel)
        with safe_open(saved / "model.safetensors", "pt") as file:
            written.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  not a mapping
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_what_was_changed_in_memory_is_saved(models: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = load(stored_in(tiny_model("llama", models), dtype, tmp_path / "model"))
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight[5:9] += 1
    again = load(loaded.save(tmp_path / "out"))
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))


def test_beside_the_librarys_kernel_they_stay_and_are_narrowed_when_asked(models: Path) -> None:
    model = tiny_model("llama", models)
    usual = load(model, kernel="library", compute_dtype="float32")
    assert type(usual.model.get_input_embeddings()) is nn.Embedding
    none = load(tiny_model("odd", models))  # no weight of which has a place in the packed layout
    assert type(none.model.get_input_embeddings()) is nn.Embedding
    asked = load(model, kernel="library", compute_dtype="float32", embeddings="16bit", head="16bit")
    assert isinstance(asked.model.get_input_embeddings(), HalfEmbedding)
    assert isinstance(asked.model.get_output_embeddings(), HalfLinear)
    assert kl_divergence(usual.logits(TOKENS), asked.logits(TOKENS)).mean() < 1e-3  # whose kernel rounds activations
    narrow = load(model, kernel="library", compute_dtype="bfloat16", embeddings="16bit")
    assert type(narrow.model.get_input_embeddings()) is nn.Embedding  # in 16 bits anyway


def test_what_is_not_there_or_does_not_fit_is_said(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="embeddings= is for both, leave head out"):
        load(tiny_model("llama-tied", models), head="16bit")

    def large(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EMBEDDING][3, 4] = 1e6

    model = changed_copy(tiny_model("llama", models), tmp_path / "large", large)
    with pytest.raises(ModelError, match=r"embed_tokens.weight holds 1e\+06, and float16 ends at .*embeddings='keep'"):
        load(model)
    assert load(model, embeddings="keep").model.get_input_embeddings().weight.max() == 1e6


# ---- as plain modules


@pytest.mark.parametrize(
    "config", [{"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
               {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}]
)  # fmt: skip
def test_adapters_and_whole_copies_train(models: Path, config: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    loaded = load(tiny_model("llama", models))
    before = loaded.model.get_input_embeddings().weight.clone()
    model = get_peft_model(loaded.backend.prepare_for_training(loaded), LoraConfig(init_lora_weights=False, **config))
    ids = torch.arange(5, 25)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert any("embed_tokens" in name for name in trained) and any("lm_head" in name for name in trained)
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in trained.values())
    base = model.get_base_model().get_input_embeddings()
    kept = next(tensor for name, tensor in base.named_parameters() if tensor.shape == before.shape)
    assert torch.equal(kept, before)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_text_is_generated(models: Path, cache: str) -> None:
    model = tiny_model("llama-tied", models)
    ids, texts = torch.arange(5, 25)[None], []
    for options in ({}, {"embeddings": "keep"}):
        loaded = load(model, **options)
        texts.append(loaded.model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation=cache))
    assert torch.equal(*texts)


def test_more_tokens_are_added(models: Path) -> None:
    loaded = load(tiny_model("llama-tied", models))
    before = loaded.logits(TOKENS)
    loaded.model.resize_token_embeddings(len(before[0]) + 8, mean_resizing=False)
    with torch.inference_mode():
        after = loaded.model(torch.tensor([TOKENS]), use_cache=False).logits[0]
    assert after.shape[1] == before.shape[1] + 8 and torch.allclose(after[:, : before.shape[1]], before, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_neox", "phi", "stablelm", "qwen3_moe", "bloom", "opt", "gpt2"])
def test_architectures_answer_as_with_whole_ones(models: Path, tmp_path: Path, kind: str) -> None:
    for _, config, model_class in zoo.configs([kind]):
        model = stored_in(zoo.build(config, model_class, models / kind), torch.bfloat16, tmp_path / "model")
        loaded, whole = load(model), load(model, embeddings="keep", head="keep")
        halves = [module for module in loaded.model.modules() if isinstance(module, (HalfEmbedding, HalfLinear))]
        assert halves
        assert torch.allclose(loaded.logits(TOKENS), whole.logits(TOKENS), rtol=1e-4, atol=1e-4)
