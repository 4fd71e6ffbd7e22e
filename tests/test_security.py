"""What docs/explanation/security.md says that a checkpoint cannot do."""

import ast
import io
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
from polyquant import api
from polyquant.models import hf
from polyquant.errors import ConfigError, ModelError, UnknownBackend
from polyquant.finetuning.data import read_examples
from polyquant.finetuning.options import TrainingOptions
from polyquant.loading.dense import load_dense
from polyquant.models.builtin import dense_from_gguf
from polyquant.models.resolve import resolve
from polyquant.testing.models import tiny_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(dense, tmp_path):
    """A copy of a real checkpoint, to be made evil, and a file that its code would write."""
    return shutil.copytree(dense, tmp_path / "model")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "code-has-run"


class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


def change(model, **entries):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_a_pickle_that_is_called_safetensors_is_not_opened(model, marker, name):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(ModelError, match="is truncated or damaged"):
        api.load(model, "bitsandbytes", device="cpu")
    assert not marker.exists()


def test_an_index_cannot_name_a_pickle(model, marker):
    (model / "evil.bin").write_bytes(pickle.dumps(Evil(marker)))
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "evil.bin"}}))
    with pytest.raises(ModelError, match=r"names files that are no safetensors: evil\.bin"):
        api.load(model, "bitsandbytes", device="cpu")
    assert not marker.exists()


def test_code_of_the_repository_is_not_run(bitsandbytes, model, marker):
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    change(model, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ModelError, match="runs Python code of its own.*read that code first, then allow it"):
        api.load(model, "bitsandbytes", device="cpu")
    assert not marker.exists()


def test_nobody_is_asked_whether_code_may_run(model, marker, monkeypatch):
    """transformers asks on standard input where it is not told."""
    change(model, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    (model / "evil.py").write_text(code)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ModelError, match="runs Python code of its own"):
        load_dense(resolve(model))
    assert not marker.exists()
    load_dense(resolve(model), trust_remote_code=True)
    assert marker.exists()


ROOT = Path(__file__).parent.parent
OURS = [ROOT / "core", *(ROOT / "plugins").glob("*/src"), ROOT / "docs" / "examples"]
READERS = {"from_pretrained", "from_config"}
READING = re.compile(r"\.(?:from_pretrained|from_config)\(([^()]|\([^()]*\))*\)")


@pytest.mark.parametrize("folder", OURS, ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_every_call_of_transformers_says_whether_code_may_run(folder):
    silent = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            called = [node.func, *node.args] if isinstance(node, ast.Call) else []  # or handed on, to be called
            if isinstance(node, ast.Call) and {getattr(each, "attr", "") for each in called} & READERS:
                silent += [] if "trust_remote_code" in {word.arg for word in node.keywords} else [where]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # code for another process
                calls = READING.finditer(node.value)
                silent += [where for call in calls if "trust_remote_code" not in call[0]]
    assert not silent


@pytest.mark.parametrize("where", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["someone/evil-kernel", {"": "someone/evil-kernel@main"}], ids=["text", "object"])
def test_compiled_code_of_the_hub_is_not_fetched(model, where, value):
    change(model, **{where: value})
    with pytest.raises(
        ModelError, match="asks for .*someone/evil-kernel.*compiled code from the hub.*name it yourself"
    ):
        resolve(model)
    change(model, **{where: "eager", "text_config": {where: value}})
    with pytest.raises(ModelError, match="compiled code from the hub"):
        resolve(model)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts", "n_layer"])
def test_a_number_cannot_keep_the_machine_busy(model, key):
    change(model, **{key: 10**9})
    with pytest.raises(ModelError, match=f"its config says {key} = 1000000000; at most 10000 are believed"):
        resolve(model)


def test_a_config_that_makes_no_model_is_our_error(model):
    change(model, hidden_size=2**62, vocab_size=2**62)
    with pytest.raises(ModelError, match="transformers makes no model of its config"):
        hf.skeleton(resolve(model), "float32")


@pytest.mark.parametrize("escape", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"])
def test_a_chat_template_cannot_leave_its_sandbox(dense, tmp_path, escape):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.chat_template = escape
    (tmp_path / "data.jsonl").write_text('{"messages": [{"role": "assistant", "content": "b"}]}')
    with pytest.raises(ConfigError, match=r"data.jsonl, line 1: the model's chat template refuses it: .*unsafe"):
        read_examples(tmp_path / "data.jsonl", tokenizer, TrainingOptions(), 64)


def test_a_gguf_header_is_checked_before_transformers_reads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 16)
    with pytest.raises(ModelError, match="it claims 18446744073709551615 tensors, and has"):
        dense_from_gguf(resolve(tmp_path / "a.gguf"))


def test_a_checkpoint_cannot_choose_what_is_imported(model):
    change(model, quantization_config={"quant_method": "os.path"})
    with pytest.raises(UnknownBackend, match="quantized with 'os.path', which no polyquant backend reads"):
        api.load(model)
