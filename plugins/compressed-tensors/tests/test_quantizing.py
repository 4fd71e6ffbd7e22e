"""Checkpoints that llm-compressor makes: their text, and what is left of the process."""

import polyquant
import pytest
import torch
from polyquant.errors import ConfigError, EnvironmentProblem
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model
from polyquant.testing.processes import run_python
from polyquant.testing.state import differences, snapshot
from polyquant.testing.texts import CALIBRATION
from transformers import AutoModelForCausalLM

from .conftest import load


def test_calibration_text_goes_to_gptq_only(checkpoint):
    with pytest.raises(ConfigError, match="'rtn' rounds to nearest and uses no calibration text"):
        checkpoint(calibration=CALIBRATION, group_size=256)
    with pytest.raises(ConfigError, match="the calibration text has .* tokens, at least 256"):
        checkpoint(calibration=["too short"], method="gptq")
    with pytest.raises(ConfigError, match="quantize with 'rtn' or 'gptq'"):
        checkpoint(method="unknown")


def test_gptq_follows_its_text(checkpoint, folder):
    """On the text it was calibrated with it stays closer to the dense model than rounding to nearest."""
    from polyquant.measure.quality.divergence import kl_divergence

    gptq = load(checkpoint(method="gptq", calibration=CALIBRATION, samples=4, length=128))
    assert (gptq.config.samples, gptq.config.length) == (4, 128)
    tokens = gptq.tokenizer(" ".join(CALIBRATION)).input_ids[:400]
    dense = AutoModelForCausalLM.from_pretrained(tiny_model("llama", folder / "dense"))
    with torch.inference_mode():
        reference = dense(torch.tensor([tokens])).logits[0]

    def divergence(loaded):
        return kl_divergence(reference, loaded.logits(tokens)).mean()

    assert divergence(gptq) < 0.8 * divergence(load(checkpoint()))


def test_without_llm_compressor_checkpoints_load_and_are_not_made(checkpoint, monkeypatch):
    from polyquant.support import libraries

    path, installed = checkpoint(), libraries.installed_version
    monkeypatch.setattr(
        libraries, "installed_version", lambda name: None if name == "llmcompressor" else installed(name)
    )
    assert_verified(load(path))
    with pytest.raises(
        EnvironmentProblem, match=r"llmcompressor is not installed\n    fix: pip install 'llmcompressor>="
    ):
        checkpoint(weights="int8", group_size=64)


def test_quantizing_is_quiet_and_leaves_the_process_as_it_was(folder, tmp_path, capfd):
    dense = tiny_model("llama", folder / "dense")
    options = {"method": "gptq", "samples": 2, "length": 64, "device": "cpu"}
    polyquant.quantize(dense, "compressed-tensors", tmp_path / "first", **options)
    capfd.readouterr()
    before = snapshot()
    polyquant.quantize(dense, "compressed-tensors", tmp_path / "out", **options)
    assert differences(before, snapshot()) == []
    assert capfd.readouterr() == ("", "")
    polyquant.quantize(dense, "compressed-tensors", tmp_path / "shown", progress=True, **options)
    assert "Calibrating" in capfd.readouterr().err


FRESH = """
import io, json, sys
from loguru import logger
said = io.StringIO()
logger.remove()
logger.add(said, format="{message}")
import polyquant, torch, transformers, accelerate
from polyquant.testing.state import differences, snapshot
before = snapshot()
polyquant.quantize(sys.argv[1], "compressed-tensors", sys.argv[2], device="cpu")
after = snapshot()
logger.info("still here")
print(json.dumps([differences(before, after), said.getvalue()]))
"""


def test_a_first_import_of_llm_compressor_changes_nothing(folder, tmp_path):
    """It adds warning filters and throws out loguru's handlers when it is imported."""
    changes, said = run_python(FRESH, str(tiny_model("llama", folder / "dense")), str(tmp_path / "out"))
    assert changes == []
    assert said == "still here\n"
