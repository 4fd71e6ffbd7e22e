"""Checkpoints: written, read back, contradicted, and writing that is cut short."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
import polyquant
import pytest
import torch
from polyquant.errors import (
    CheckpointConflict,
    ModelError,
    SaveError,
    UnknownBackend,
)
from polyquant.testing import warm

from .conftest import CONFIGURATIONS, NF4, TOKENS, load


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("after_use", [False, True], ids=["fresh", "after a forward pass"])
def test_a_saved_checkpoint_loads_back_bit_for_bit(tiny, tmp_path, name, after_use):
    loaded = load(tiny, **CONFIGURATIONS[name][0])
    if after_use:
        loaded.logits(TOKENS)
    loaded.save(tmp_path / "out")
    fresh, again = (
        load(tiny, **CONFIGURATIONS[name][0]),
        polyquant.load(tmp_path / "out", compute_dtype="float32", device="cpu"),
    )
    ours, theirs = fresh.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(fresh.logits(TOKENS), again.logits(TOKENS))
    assert torch.equal(loaded.logits(TOKENS), again.logits(TOKENS))
    assert polyquant.verify(again).passed


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    return load(tiny, **NF4).save(tmp_path_factory.mktemp("saved") / "nf4")


def test_a_quantized_checkpoint_refuses_options_that_contradict_it_field_by_field(saved):
    with pytest.raises(
        CheckpointConflict,
        match=r"(?s)bits: requested 8, stored 4.*only compute_dtype, embeddings, experts, head, kernel can be chosen now",
    ):
        polyquant.load(saved, "bitsandbytes", bits=8)
    with pytest.raises(CheckpointConflict, match="quant_type: requested 'fp4', stored 'nf4'"):
        polyquant.load(saved, quant_type="fp4")
    assert polyquant.load(saved, quant_type="nf4", device="cpu").config.quant_type == "nf4"


def test_the_compute_dtype_of_a_quantized_checkpoint_can_be_chosen(saved):
    loaded = polyquant.load(saved, compute_dtype="bfloat16", device="cpu")
    linears = [module for module in loaded.model.modules() if hasattr(module, "compute_dtype")]
    assert {module.compute_dtype for module in linears} == {torch.bfloat16}
    assert loaded.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("stored", "error", "message"),
    [
        ({"quant_method": "frob"}, UnknownBackend, "quantized with 'frob', which no polyquant backend reads; installed backends read .*bitsandbytes"),
        ({"bits": 4}, ModelError, "names no quant_method; it holds bits"),
        ({"quant_method": "quip"}, UnknownBackend, "QuIP#.*quip-sharp"),
    ],
)  # fmt: skip
def test_an_unknown_method_is_an_error_that_names_the_reader(saved, tmp_path, stored, error, message):
    folder = shutil.copytree(saved, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    with pytest.raises(error, match=message):
        polyquant.load(folder)


def test_a_checkpoint_of_another_method_is_refused_by_name(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(CheckpointConflict, match="quantized already with 'gptq'; bitsandbytes reads bitsandbytes"):
        polyquant.load(folder, "bitsandbytes")


SAVE = """
import sys, polyquant
from polyquant.errors import PolyquantError
loaded = polyquant.load(sys.argv[1], "bitsandbytes", device="cpu", quant_type="nf4")
print("loaded", flush=True)
{before}
try:
    loaded.save(sys.argv[2], overwrite=True)
except PolyquantError as error:
    print(type(error).__name__, error)
print("saved", flush=True)
"""


def test_a_full_disk_during_save_leaves_the_old_checkpoint(tiny, saved, tmp_path):
    out = shutil.copytree(saved, tmp_path / "out")
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    code = SAVE.format(before=limit)
    result = subprocess.run(
        [warm.interpreter(), "-c", code, tiny, out], capture_output=True, text=True, timeout=120, check=False
    )
    assert "SaveError writing" in result.stdout, result.stdout + result.stderr
    assert "is unchanged" in result.stdout
    assert [child.name for child in tmp_path.iterdir()] == ["out"]
    assert torch.equal(
        polyquant.load(out, device="cpu").logits(TOKENS), polyquant.load(saved, device="cpu").logits(TOKENS)
    )


def test_a_kill_during_save_leaves_the_old_checkpoint(tiny, saved, tmp_path):
    """Killed at several moments of writing; what lies at the destination always loads as the old or the new one."""
    random.seed(0)
    expected = polyquant.load(saved, device="cpu").logits(TOKENS)
    for attempt in range(4):
        out = shutil.copytree(saved, tmp_path / str(attempt) / "out")
        process = subprocess.Popen(
            [warm.interpreter(), "-c", SAVE.format(before=""), tiny, out], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "loaded\n"
        time.sleep(random.uniform(0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert torch.equal(polyquant.load(out, device="cpu").logits(TOKENS), expected)
        leftovers = [child.name for child in out.parent.iterdir() if child.name != "out"]
        assert all(name.startswith(".out.") for name in leftovers)


def test_quantize_writes_nothing_where_verification_fails(experts, tmp_path):
    with pytest.raises(SaveError, match="not written, because verification failed: coverage"):
        polyquant.quantize(experts, "bitsandbytes", tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SaveError, match="exists; choose another folder"):
        polyquant.quantize(experts, "bitsandbytes", tmp_path)
