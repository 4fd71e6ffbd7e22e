"""kernel="packed" from a user's side: planned, said, refused with words, saved from unchanged files only."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import polyquant
import pytest
import torch
from polyquant.cli.main import main
from polyquant.errors import ConfigError, PolyquantError, SaveError
from polyquant.measure.quality.divergence import kl_divergence
from polyquant.packed_weights import kernels, step
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.testing.models import tiny_model

SCHEMES = {"8bit": "int8-g32", "4bit": "int4-g32"}
pytestmark = pytest.mark.usefixtures("bitsandbytes")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def packed_layers(model: Any) -> int:
    return sum(isinstance(module, RepackedLinear) for module in model.modules())


def test_it_is_planned_loaded_and_said(models: Path) -> None:
    model = tiny_model("llama", models)
    loaded = polyquant.load(model, "bitsandbytes", kernel="packed", device="cpu")
    assert loaded.kernel == f"{kernels.name()}, whole steps" and packed_layers(loaded.model) == 14
    assert {layer.kernel for layer in loaded.layers if layer.quantized} == {kernels.name()}
    assert loaded.config.compute_dtype == "float32" and loaded.config.kernel == "packed"
    report = polyquant.verify(loaded)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.memory.quantized_reported_bytes == report.memory.quantized_bytes
    plan = polyquant.plan(model, "bitsandbytes", kernel="packed", device="cpu")
    assert plan.weights_planned_bytes == report.memory.weights_stored_bytes
    nested = [
        polyquant.plan(
            model, "bitsandbytes", double_quant=True, kernel=kernel, compute_dtype="float32", device="cpu",
            embeddings="16bit", head="16bit",
        )
        for kernel in ("packed", "library")
    ]  # fmt: skip
    assert nested[0].weights_planned_bytes == plan.weights_planned_bytes > nested[1].weights_planned_bytes


def test_the_command_line_takes_it(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*more: str) -> str:
        words = ["polyquant", "run", str(tiny_model("llama", models)), "The water", "--backend", "bitsandbytes"]
        monkeypatch.setattr(sys, "argv", [*words, "--device", "cpu", "--max-new-tokens", "3", *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert run("--kernel", "packed") == run("--kernel", "library", "--compute-dtype", "float32")


def test_layers_without_a_place_stay_with_the_library(models: Path) -> None:
    loaded = polyquant.load(tiny_model("odd", models), "bitsandbytes", kernel="packed", device="cpu")
    kinds = {layer.kernel for layer in loaded.layers if layer.quantized}
    assert len(kinds) >= 1 and not any("whole steps" in kind for kind in kinds)
    assert any("they have no place in the packed layout" in note for note in loaded.notes)
    assert polyquant.verify(loaded).passed


def test_without_the_compiled_kernels_plain_torch_multiplies(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2", models)
    compiled = polyquant.load(model, "bitsandbytes", kernel="packed", device="cpu").logits(range(5, 25))
    monkeypatch.setattr(kernels, "library", lambda: None)
    loaded = polyquant.load(model, "bitsandbytes", kernel="packed", device="cpu")
    assert loaded.kernel == "packed (plain torch)"
    assert "plain torch multiplies, slowly: pip install polyquant-kernels" in loaded.notes
    assert torch.allclose(loaded.logits(range(5, 25)), compiled, atol=1e-2)


def test_other_devices_and_values_are_refused(models: Path) -> None:
    model = tiny_model("llama", models)
    with pytest.raises(ConfigError, match="for a CPU so far, and this is cuda:0: take kernel='library'"):
        polyquant.plan(model, "bitsandbytes", kernel="packed", device="cuda:0")
    with pytest.raises(ConfigError, match="kernel must be 'auto', 'packed' or 'library', got 'fast'"):
        polyquant.load(model, "bitsandbytes", kernel="fast")


def test_a_saved_model_is_the_librarys_and_has_no_kernel_in_it(models: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", models)
    loaded = polyquant.load(model, "bitsandbytes", kernel="packed", device="cpu")
    saved = loaded.save(tmp_path / "saved")
    assert "kernel" not in json.loads((saved / "config.json").read_text())["quantization_config"]
    stored = polyquant.load(saved, kernel="packed", device="cpu")
    assert torch.equal(stored.logits(range(5, 25)), loaded.logits(range(5, 25)))
    assert packed_layers(polyquant.load(saved, device="cpu").model) == 0


def test_what_has_changed_since_it_was_loaded_is_not_saved(models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny_model("llama", models), tmp_path / "model"))
    loaded = polyquant.load(model, "bitsandbytes", kernel="packed", device="cpu")
    tensors = load_file(model / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SaveError, match=r"has changed since it was loaded: model.layers.1.mlp.up_proj is another weight"
    ):
        loaded.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    shutil.rmtree(model)
    with pytest.raises(PolyquantError):
        loaded.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_steps_are_taken_by_generate_and_sessions(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("polyquant_kernels")
    steps: list[Any] = []
    answer = step.DecodeStep.answer
    monkeypatch.setattr(step.DecodeStep, "answer", lambda self, given: steps.append(answer(self, given)) or steps[-1])
    loaded = polyquant.load(tiny_model("llama", models), "bitsandbytes", kernel="packed", device="cpu")
    steps.clear()
    loaded.generate("The water of the lake", max_new_tokens=6, do_sample=False)
    assert [each is not None for each in steps] == [True] * 6
    feed = loaded.session()
    steps.clear()
    feed([5, 6, 7])
    feed([8])
    feed([9])
    assert [each is not None for each in steps] == [True] * 3


def test_a_dense_model_of_it_has_its_weights(models: Path) -> None:
    loaded = polyquant.load(tiny_model("llama", models), "bitsandbytes", kernel="packed", device="cpu")
    expected = loaded.logits(range(5, 25))
    dense = loaded.model.dequantize()
    assert packed_layers(dense) == 0
    with torch.inference_mode():
        assert torch.allclose(dense(torch.arange(5, 25)[None]).logits[0], expected, atol=1e-2)


@pytest.mark.parametrize("kernel", ["packed", "library"])
@pytest.mark.parametrize("bits", list(SCHEMES))
@pytest.mark.parametrize("name", ["llama", "llama-tied", "odd"])
def test_embedding_and_head_in_few_bits(models: Path, name: str, bits: str, kernel: str, tmp_path: Path) -> None:
    model, tied = tiny_model(name, models), name == "llama-tied"
    how: dict[str, Any] = {"kernel": kernel, "compute_dtype": "float32", "device": "cpu"}
    dense = polyquant.load(model, "bitsandbytes", **how)
    small = {"embeddings": bits, **({} if tied else {"head": bits})}
    loaded = polyquant.load(model, "bitsandbytes", **how, **small)
    report = polyquant.verify(loaded)
    assert report.passed, [check for check in report.checks if not check.passed]
    plan = polyquant.plan(model, "bitsandbytes", **how, **small)
    stored = report.memory.weights_stored_bytes
    assert plan.weights_planned_bytes == stored < 0.9 * sum(layer.stored_bytes for layer in dense.layers)
    found = {layer.role: layer for layer in loaded.layers if layer.role in ("embedding", "head")}
    assert found["embedding"].quantized and found["embedding"].scheme == SCHEMES[bits]
    assert found["head"].quantized is not tied and found["head"].bits == int(bits.removesuffix("bit"))
    assert not tied or found["head"].reason == "tied to model.embed_tokens.weight"
    tokens = range(5, 45)
    divergence = kl_divergence(dense.logits(tokens), loaded.logits(tokens)).mean()
    assert divergence < {"8bit": 0.002, "4bit": 0.2}[bits]
    assert ("whole steps" in loaded.kernel) == (kernel == "packed" and name != "odd" and kernels.library() is not None)
    saved = loaded.save(tmp_path / "saved")
    again = polyquant.load(saved, **how, **small)
    assert torch.equal(again.logits(tokens), loaded.logits(tokens))
    assert loaded.generate("The water", max_new_tokens=4, do_sample=False)


def test_what_was_changed_in_memory_is_saved(models: Path, tmp_path: Path) -> None:
    loaded = polyquant.load(tiny_model("llama", models), "bitsandbytes", kernel="packed", device="cpu")
    before = loaded.logits([3, 4, 5])
    with torch.no_grad():
        loaded.model.model.norm.weight.mul_(2)
        loaded.model.model.embed_tokens.weight[3:6] += 1
    changed = loaded.logits([3, 4, 5])
    again = polyquant.load(loaded.save(tmp_path / "out"), kernel="packed", device="cpu")
    assert not torch.equal(before, changed) and torch.equal(again.logits([3, 4, 5]), changed)


def test_what_cannot_be_packed_is_said(models: Path) -> None:
    with pytest.raises(ConfigError, match="lm_head.weight is tied to .*: embeddings= is for both, leave head out"):
        polyquant.plan(tiny_model("llama-tied", models), "bitsandbytes", head="8bit", device="cpu")
    with pytest.raises(ConfigError, match="lm_head.weight is nf4 already: leave head out"):
        polyquant.load(tiny_model("llama", models), "bitsandbytes", head="8bit", skip_defaults=False, device="cpu")
    with pytest.raises(ConfigError, match="embeddings must be 'auto', 'keep', '16bit', '8bit' or '4bit'"):
        polyquant.load(tiny_model("llama", models), "bitsandbytes", embeddings="2bit")


def test_adapters_train_beside_a_packed_embedding(models: Path) -> None:
    from peft import LoraConfig, get_peft_model

    loaded = polyquant.load(
        tiny_model("llama-tied", models), "bitsandbytes", kernel="packed", embeddings="8bit", device="cpu"
    )
    model = get_peft_model(
        loaded.backend.prepare_for_training(loaded), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    ids = torch.arange(5, 25)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    assert trained and all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in trained)


def test_ids_that_are_not_in_the_table_are_refused(models: Path) -> None:
    loaded = polyquant.load(tiny_model("llama", models), "bitsandbytes", embeddings="8bit", device="cpu")
    embedding = loaded.model.get_input_embeddings()
    for wrong in (-1, 384):
        with pytest.raises(IndexError, match="rows go from 0 to 383"):
            embedding(torch.tensor([[wrong]]))
    assert embedding(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 256)
    assert torch.equal(embedding(torch.tensor([[3, 7]])), embedding.dequantize()[None, [3, 7]])
