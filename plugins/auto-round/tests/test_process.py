"""What loading and quantizing leave of the process, and what auto-round says."""

import shutil
from pathlib import Path
import polyquant
import pytest
from polyquant.testing.models import tiny_model
from polyquant.testing.state import differences, snapshot

from .conftest import quantize


def test_quantizing_leaves_the_process_alone(folder, tmp_path, monkeypatch, capfd):
    """auto-round seeds everything, sets variables and print options, and writes work files where it runs."""
    monkeypatch.chdir(tmp_path)
    llama = tiny_model("llama", folder)
    capfd.readouterr()
    before = snapshot()
    quantize(llama, tmp_path / "out")
    assert not differences(before, snapshot())
    assert [path.name for path in Path.cwd().iterdir()] == ["out"]
    assert capfd.readouterr() == ("", "")


def test_what_auto_round_replaces_is_put_back():
    from polyquant.testing.processes import run_python

    code = """
import json, sys, polyquant
import torch, transformers.quantizers.auto
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.core_model_loading import Transpose
from polyquant.testing.state import differences, snapshot
state, methods = snapshot(), (AutoModelForCausalLM.from_pretrained, Transpose.convert, PreTrainedModel._init_weights)
from polyquant_auto_round._library import algorithm
rounding = algorithm(polyquant.backend("auto-round").config({"iters": 5}))
after = (AutoModelForCausalLM.from_pretrained, Transpose.convert, PreTrainedModel._init_weights)
print(json.dumps([type(rounding).__name__, "auto_round" in sys.modules, hasattr(torch.Tensor, "get_dtype"),
                  methods == after, differences(state, snapshot())]))
"""
    assert run_python(code, imported=True) == ["SignRoundConfig", True, False, True, []]


def test_loading_imports_no_auto_round(made):
    """Its import replaces methods of transformers, and its loading breaks other models of the process."""
    from polyquant.testing.processes import run_python

    code = """
import json, sys, polyquant
polyquant.load(sys.argv[1], "auto-round", device="cpu")
print(json.dumps(["auto_round" in sys.modules, "auto_round_kernel" in sys.modules]))
"""
    assert run_python(code, str(made()), imported=True) == [False, True]


def test_what_auto_round_says_last_is_kept(folder, tmp_path):
    """It ends its process where it cannot go on."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model("llama", folder), broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-64])
    with pytest.raises(polyquant.errors.PolyquantError, match="model.safetensors|incomplete"):
        quantize(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
