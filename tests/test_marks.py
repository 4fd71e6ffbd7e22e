"""What transformers asks of a quantized model: it is marked as its own are, not cast, not trained, dense when asked."""

import copy

import peft
import polyquant
import pytest
import torch
from polyquant.errors import CastRefused, UnsupportedOperation
from polyquant.testing.models import tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

pytestmark = pytest.mark.usefixtures("rowwise")
TOKENS = list(range(5, 40))
CASTS = {
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to(torch.bfloat16),
    "to its own": lambda model: model.to(dtype=torch.float32),
    "to device and dtype": lambda model: model.to("cpu", torch.float16),
    "type": lambda model: model.type(torch.float16),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {name: tiny_model(name, folder) for name in ("llama", "llama-tied", "qwen2")}


@pytest.fixture
def loaded(models):
    return polyquant.load(models["llama"], "rowwise", device="cpu", compute_dtype="float32")


def test_it_is_marked_as_transformers_marks_its_own(loaded):
    model = loaded.model
    assert model.is_quantized
    assert model.quantization_method == "polyquant-rowwise"
    assert model.hf_quantizer.quantization_config.to_dict() == loaded.config.to_stored()
    assert model.hf_quantizer.is_trainable
    assert polyquant.verify(loaded).passed


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_it_is_not_cast(loaded, cast, wrapped):
    model = peft.get_peft_model(loaded.model, peft.LoraConfig(target_modules=["q_proj"])) if wrapped else loaded.model
    before = loaded.logits(TOKENS)
    with pytest.raises(ValueError, match=r"quantized"):
        CASTS[cast](model)
    assert torch.equal(loaded.logits(TOKENS), before)
    assert {tensor.dtype for tensor in loaded.model.parameters()} == {torch.float32}


def test_a_refused_cast_says_what_to_do(loaded):
    with pytest.raises(CastRefused, match=r"rowwise is not cast.*compute_dtype=.*model.dequantize\(\)"):
        loaded.model.to(torch.float16)


def test_it_is_moved_and_copied(loaded):
    before = loaded.logits(TOKENS)
    assert loaded.model.to("cpu") is loaded.model
    twin = copy.deepcopy(loaded.model)
    loaded.model.to("meta")
    assert all(tensor.device.type == "cpu" for tensor in twin.parameters())
    loaded.model = twin
    assert torch.equal(loaded.logits(TOKENS), before)
    with pytest.raises(CastRefused):
        twin.to(torch.float16)


def train(model, folder):
    arguments = TrainingArguments(str(folder), max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    rows = [{"input_ids": TOKENS, "labels": TOKENS}] * 8
    return Trainer(model=model, args=arguments, train_dataset=rows).train()


def test_a_trainer_refuses_the_bare_base_and_trains_adapters(loaded, tmp_path):
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        train(loaded.model, tmp_path)
    model = peft.get_peft_model(
        loaded.backend.prepare_for_training(loaded), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    assert train(model, tmp_path).training_loss > 0


def test_transformers_does_not_save_what_nothing_reads(loaded, tmp_path, caplog):
    with pytest.raises(ValueError, match="quantized with rowwise and is not serializable"):
        loaded.model.save_pretrained(tmp_path / "out")
    assert "loaded.save(DIR)" in caplog.text
    assert polyquant.verify(polyquant.load(loaded.save(tmp_path / "own"), device="cpu")).passed


@pytest.mark.parametrize("model", ["llama", "llama-tied", "qwen2"])
def test_dequantized_it_is_a_dense_model_like_any_other(models, tmp_path, model):
    loaded = polyquant.load(models[model], "rowwise", device="cpu", compute_dtype="float32")
    before = loaded.logits(TOKENS)
    dense = loaded.model.dequantize()
    assert dense is loaded.model
    assert not dense.is_quantized
    assert not hasattr(dense.config, "quantization_config")
    assert torch.allclose(loaded.logits(TOKENS), before, atol=1e-3)
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        logits = again(torch.tensor([TOKENS])).logits[0]
    assert torch.allclose(logits, before, atol=1e-3)
    assert next(dense.half().parameters()).dtype == torch.float16
    adapted = peft.get_peft_model(dense.float(), peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    adapted.merge_and_unload()
    with pytest.raises(ValueError, match="quantize"):
        loaded.model.dequantize()


def test_dequantized_in_another_dtype(loaded):
    dense = loaded.model.dequantize(torch.bfloat16)
    assert {tensor.dtype for tensor in dense.parameters()} == {torch.bfloat16}


def test_what_is_more_than_a_weight_is_not_dequantized(loaded):
    layer = loaded.model.model.layers[1].mlp.up_proj
    layer.norm = torch.nn.LayerNorm(4)
    with pytest.raises(UnsupportedOperation, match=r"layers.1.mlp.up_proj \(RowwiseLinear\) of rowwise is more than"):
        loaded.model.dequantize()
    assert loaded.model.is_quantized
    assert type(loaded.model.model.layers[0].mlp.up_proj) is type(layer)
