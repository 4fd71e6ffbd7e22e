"""What `kernel="auto"` comes to: packed on a CPU in float32 where kernels and places are there, else the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polyquant
import pytest
from polyquant.errors import ConfigError
from polyquant.packed_weights import kernels
from polyquant.testing.models import tiny_model

from . import zoo

pytestmark = pytest.mark.usefixtures("bitsandbytes")


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("polyquant_kernels")
    monkeypatch.delenv("POLYQUANT_KERNEL", raising=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def chosen(model: Any, backend: str = "bitsandbytes", **options: Any) -> tuple[str, str, str]:
    loaded = polyquant.load(model, backend, device="cpu", **options)
    plan = polyquant.plan(model, backend, device="cpu", **options)
    assert polyquant.verify(loaded).memory.weights_stored_bytes == plan.weights_planned_bytes
    return loaded.kernel.partition(" ")[0], loaded.config.kernel, loaded.config.compute_dtype


@pytest.mark.parametrize("model", ["llama", "llama-tied", "qwen2"])
@pytest.mark.parametrize("options", [{"quant_type": "nf4"}, {"bits": 8}, {"compute_dtype": "float32"}])
def test_it_is_packed(models: Path, model: str, options: dict[str, Any]) -> None:
    assert chosen(tiny_model(model, models), **options) == ("packed", "packed", "float32")


def test_sixteen_bits_and_libraries_that_are_named_stay(models: Path) -> None:
    model = tiny_model("llama", models)
    assert chosen(model, compute_dtype="bfloat16") == ("bitsandbytes", "auto", "bfloat16")
    assert chosen(model, kernel="library")[:2] == ("bitsandbytes", "library")


def test_weights_without_a_place_stay(models: Path) -> None:
    if polyquant.backend("quanto").problems("cpu"):
        pytest.skip("quanto does not run here")
    model = tiny_model("llama", models)
    assert chosen(model, "quanto", weights="int2")[:2] == ("quanto", "auto")
    assert chosen(model, "quanto", weights="int4")[:2] == ("packed", "packed")


def test_weights_that_would_take_much_more_memory_stay(models: Path) -> None:
    if polyquant.backend("gguf").problems("cpu"):
        pytest.skip("gguf does not run here")
    model = tiny_model("llama", models)
    assert chosen(model, "gguf", type="Q4_0")[:2] == ("packed", "packed")
    assert chosen(model, "gguf", type="Q5_1")[1] == "auto"
    assert chosen(model, "gguf", type="Q5_1", kernel="packed")[0] == "packed"


def test_a_model_that_does_not_run_with_it_has_the_library(models: Path) -> None:
    """This architecture's code reads the weight of a linear layer itself."""
    found = {kind: (config, model_class) for kind, config, model_class in zoo.configs(["hunyuan_v1_moe"])}
    if not found:
        pytest.skip("this transformers has no such model")
    model = zoo.build(*found["hunyuan_v1_moe"], models / "hunyuan")
    with pytest.raises(ConfigError, match="cannot run.*keep them dense"):
        polyquant.load(model, "bitsandbytes", device="cpu", kernel="packed")
    loaded = polyquant.load(model, "bitsandbytes", device="cpu")
    assert loaded.kernel.startswith("bitsandbytes")
    assert any("the library multiplies, since the model does not run" in note for note in loaded.notes)


def test_without_kernels_the_library_multiplies(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert chosen(tiny_model("llama", models))[0] == "bitsandbytes"


def test_kernels_of_another_interface_are_not_used(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import polyquant_kernels

    kernels.library.cache_clear()
    monkeypatch.setattr(polyquant_kernels, "INTERFACE", 1)
    assert chosen(tiny_model("llama", models))[0] == "bitsandbytes"
    assert "has interface 1" in kernels.told()


def test_the_environment_says_it_for_all(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", models)
    monkeypatch.setenv("POLYQUANT_KERNEL", "library")
    assert chosen(model)[0] == "bitsandbytes"
    assert chosen(model, kernel="packed")[0] == "packed"
    monkeypatch.setenv("POLYQUANT_KERNEL", "paked")
    with pytest.raises(ConfigError, match="POLYQUANT_KERNEL must be 'auto' or 'library', got 'paked'"):
        polyquant.load(model, "bitsandbytes", device="cpu")


def test_what_is_written_is_the_librarys_and_runs_packed(models: Path, tmp_path: Path) -> None:
    written = polyquant.quantize(tiny_model("llama", models), "bitsandbytes", tmp_path / "out", device="cpu")
    assert chosen(written)[:2] == ("packed", "packed")
    loaded = polyquant.load(written, device="cpu")
    again = polyquant.load(loaded.save(tmp_path / "again"), device="cpu")
    assert bool((again.logits([3, 4, 5]) == loaded.logits([3, 4, 5])).all())
