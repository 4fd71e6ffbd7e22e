"""What docs/explanation/security.md says that a checkpoint cannot do."""

import ast
import io
import json
import pickle
import random
import re
import shutil
import struct
from contextlib import contextmanager
from pathlib import Path
from time import process_time

import psutil
import pytest
from polyquant import api
from polyquant.models import hf
from polyquant.errors import AdapterError, ConfigError, ModelError, UnknownBackend
from polyquant.loading.adapter_config import require_bounded
from polyquant.models.outline import outline
from polyquant.models.patterns import unbounded
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
    (model / "evil.py").write_text(f"""
open({str(marker)!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): config_class = Config
""")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ModelError, match="runs Python code of its own"):
        load_dense(resolve(model))
    assert not marker.exists()
    load_dense(resolve(model), trust_remote_code=True)
    assert marker.exists()


ROOT = Path(__file__).parent.parent
OURS = [ROOT / "core", *(ROOT / "plugins").glob("*/src"), ROOT / "docs" / "examples"]
READERS = {"from_pretrained", "from_config"}
READS_NOTHING = "AutoHfQuantizer"  # its from_config takes a quantization config and makes an object of it
READING = re.compile(r"\.(?:from_pretrained|from_config)\(([^()]|\([^()]*\))*\)")


@pytest.mark.parametrize("folder", OURS, ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_every_call_of_transformers_says_whether_code_may_run(folder):
    silent = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            called = [node.func, *node.args] if isinstance(node, ast.Call) else []  # or handed on, to be called
            called = [each for each in called if READS_NOTHING != getattr(getattr(each, "value", None), "id", "")]
            if {getattr(each, "attr", "") for each in called} & READERS:
                silent += [] if "trust_remote_code" in {word.arg for word in node.keywords} else [where]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # code for another process
                calls = READING.finditer(node.value)
                silent += [where for call in calls if "trust_remote_code" not in call[0]]
    assert not silent


@pytest.mark.parametrize(
    "where",
    ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"],
)
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


@pytest.mark.parametrize(("key", "most"), [("num_hidden_layers", 1000), ("num_local_experts", 5000), ("n_layer", 1000)])
def test_a_number_cannot_keep_the_machine_busy(model, key, most):
    change(model, **{key: 10**9})
    with pytest.raises(ModelError, match=f"its config says {key} = 1000000000; at most {most} are believed"):
        resolve(model)
    change(model, **{key: 1, "text_config": {"num_hidden_layers": 900, "num_experts": 4000}})
    with pytest.raises(ModelError, match="its config asks for 3600000 experts in 900 layers; 50000 are believed"):
        resolve(model)


ENDLESS = "(.*a)+(.*a)+!"
PATTERNED = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", ENDLESS]},
    {"quant_method": "fp8", "modules_to_not_convert": [ENDLESS]},
    {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": {f"-:{ENDLESS}": {}}},
    {"quant_method": "compressed-tensors", "ignore": [f"re:{ENDLESS}"]},
    {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": [f"re:{ENDLESS}"]}}},
    {"quant_method": "torchao", "quant_type": {"default": {"_type": "FqnToConfig", "_data": {f"re:{ENDLESS}": None}}}},
    {"quant_method": "auto-round", "extra_config": {ENDLESS: {"bits": 16}}},
]


@pytest.mark.parametrize("stored", PATTERNED, ids=lambda stored: stored["quant_method"])
def test_a_pattern_cannot_keep_the_machine_busy(model, stored):
    change(model, quantization_config=stored)
    refused = pytest.raises(ModelError, match=r"regular expression .*\(\.\*a\)\+.* may never end: a repetition")
    with refused, bounded():
        resolve(model)
    with refused, bounded():
        outline(model)
    with refused, bounded():
        api.load(model)
    change(model, quantization_config=None)
    (model / "quantize_config.json").write_text(json.dumps(stored))
    with refused, bounded():
        resolve(model)


@pytest.mark.parametrize(
    "pattern",
    ["lm_head", "re:.*lm_head", "re:.*mlp.gate$", "re:.*self_attn.(q|k|v)_proj", r"model\.layers\.\d+\.mlp\..*",
     r"-:.*\.(?:q|k)_proj.*", r"+:.*\.18\..*gate.*", r"re:.*layers\..*\.mlp\..*experts.*", "C++", "*lm_head", "(",
     r"^(?!.*vision).*language_model.*\.(q_proj|k_proj|v_proj|o_proj)$",
     r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:q_proj|k_proj|v_proj|gate_proj|up_proj).*?)"
     r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|k_proj|v_proj)))"],
)  # fmt: skip
def test_patterns_that_tools_write_are_no_reason_to_refuse(pattern):
    assert unbounded({"ignore": [pattern], pattern: 1}) == ""


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|aa)*b", "(.*a){20}", "(.*)*x", ".*.*.*.*x", "(a?){30}a{30}", "a*" * 9 + "b", r"(a)\1*", "x" * 2000 + "*",
     ".*a.*a.*a.*a.*a.*a.*a.*b", "(aa|aa)" * 30 + "b", "(a|ab)" * 40 + "$", "(" * 450 + "a*" + ")" * 450 + "+"],
)  # fmt: skip
def test_patterns_that_never_end_are_found_in_time(pattern):
    with bounded():
        assert "may never end" in unbounded({"layers": [{"a": [pattern]}]})


def test_patterns_that_are_accepted_end_soon():
    """Of chance patterns, each that is not refused is matched against long names at once."""
    chance = random.Random(0)
    accepted = 0
    for pattern in (_chance_pattern(chance) for _ in range(1500)):
        if unbounded([pattern]):
            continue
        accepted += 1
        started = process_time()
        for name in ("a" * 60, "abab" * 15, "model.layers.10.mlp.experts.99.down_proj.aaaaaaa"):
            re.match(f"{pattern}!", name)
        assert process_time() - started < 1, pattern
    assert accepted > 500


def _chance_pattern(chance, depth=0):
    kind = chance.random() if depth < 4 else 0.0
    if kind < 0.45:
        return chance.choice(["a", "b", "_", ".", "[a-z]", r"\w", "[^.]"])
    if kind < 0.7:
        return "(?:" + _chance_pattern(chance, depth + 1) + ")" + chance.choice(["*", "+", "?", "{2,9}", "*?", "{3}"])
    if kind < 0.8:
        return f"({_chance_pattern(chance, depth + 1)}|{_chance_pattern(chance, depth + 1)})"
    return "".join(_chance_pattern(chance, depth + 1) for _ in range(chance.randint(2, 5)))


@contextmanager
def bounded():
    """What a refused file may cost: 5 s of this process's time, and 500 MB."""
    before, started = psutil.Process().memory_info().rss, process_time()
    try:
        yield
    finally:
        assert process_time() - started < 5
        assert psutil.Process().memory_info().rss - before < 500e6


def header_of(tensors, metadata=None):
    header = {f"{number:x}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(tensors)}
    raw = json.dumps({**header, **({"__metadata__": metadata} if metadata else {})}, separators=(",", ":")).encode()
    return struct.pack("<Q", len(raw)) + raw


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header_of(200_001), "its header has 200001 tensors; at most 200000 are read"),
        (header_of(1, {"a": "x" * 2**25}), r"its header has \d+ bytes; at most 33554432 are read"),
    ],
    ids=["tensors", "metadata"],
)
def test_a_safetensors_header_cannot_keep_the_machine_busy(model, content, words):
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=words), bounded():
        resolve(model)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b'{"a":[' + b"{}," * 2**21 + b"0]}", "larger than 4194304 bytes"),
        ("config.json", b'{"a":' * 60 + b"0" + b"}" * 60, "nested deeper than 50 levels"),
        ("config.json", b'{"model_type": "llama", "quantization_config": {"a": [' + b'"a",' * 30_000 + b'"b"]}}',
         "has more than 20000 texts"),
        ("model.safetensors.index.json", b'{"weight_map": [' + b"{}," * 2**22 + b"0]}", "has no weight_map"),
        ("model.safetensors.index.json", b'{"a": ' + b"[" * 10**6 + b'], "weight_map": {}}', "not readable JSON"),
    ],
)  # fmt: skip
def test_json_cannot_keep_the_machine_busy(model, name, content, words):
    (model / name).write_bytes(content)
    with pytest.raises(ModelError, match=words), bounded():
        resolve(model)


def gguf(pairs, tensors=0, content=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + content


def gguf_text(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gguf(10_001) + b"\0" * 13 * 10_001, "has 10001 metadata keys; at most 10000 are read"),
        (gguf(0, 100_001) + b"\0" * 25 * 100_001, "has 100001 tensors; at most 100000 are read"),
        (gguf(1) + gguf_text(b"a") + struct.pack("<IIQ", 9, 8, 2_000_001) + b"\0" * 8 * 2_000_001,
         "has 2000001 strings of a; at most 2000000 are read"),
        (gguf(1) + gguf_text(b"a") + struct.pack("<I", 8) + gguf_text(b"x" * (2**24 + 1)), "a value of a of 16777217 bytes"),
    ],
    ids=["keys", "tensors", "strings", "text"],
)  # fmt: skip
def test_a_gguf_header_cannot_keep_the_machine_busy(tmp_path, content, words):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=words), bounded():
        outline(tmp_path / "a.gguf")


HOSTILE = {
    "another type": ({"peft_type": "IA3"}, "is a IA3 adapter of PEFT's, and LoRA .* is what goes on"),
    "no type": ({"peft_type": None}, "is a None adapter"),
    "targets": ({"target_modules": ENDLESS}, "may never end"),
    "excluded": ({"exclude_modules": ENDLESS}, "may never end"),
    "ranks": ({"rank_pattern": {ENDLESS: 8}}, "may never end"),
    "alphas": ({"alpha_pattern": {ENDLESS: 8}}, "may never end"),
    "layers": ({"layers_pattern": [ENDLESS]}, "may never end"),
    "saved": ({"modules_to_save": [ENDLESS]}, "may never end"),
    "many targets": ({"target_modules": ["a"] * 30_000}, "more than 20000 texts"),
    "replication": ({"layer_replication": [[0, 2]] * 600}, "layer_replication makes 1200 layers; at most 1000"),
    "no pairs": ({"layer_replication": [1]}, "layer_replication must be pairs of numbers"),
    "rank": ({"r": 10**9}, "asks for matrices of rank 1000000000, and those that it holds have 2"),
    "a rank": ({"rank_pattern": {"q_proj": 10**9}}, "asks for matrices of rank 1000000000"),
    "no rank": ({"r": "8"}, "must give ranks from 1"),
    "negative rank": ({"r": -8}, "must give ranks from 1"),
    "an import": ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "PEFT imports a module that it names"),
    "another import": ({"megatron_core": "antigravity"}, "PEFT imports a module that it names"),
    "deep": ({"loftq_config": json.loads('{"a":' * 60 + "0" + "}" * 60)}, "nested deeper than 50 levels"),
}


@pytest.fixture(scope="module")
def adapter(dense, tmp_path_factory):
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(dense)
    out = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        out
    )
    return out


@pytest.mark.parametrize("name", HOSTILE)
def test_an_adapter_cannot_keep_the_machine_busy(adapter, tmp_path, name):
    entries, words = HOSTILE[name]
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    asked = json.loads((folder / "adapter_config.json").read_text())
    require_bounded(folder, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(asked | entries))
    with pytest.raises(AdapterError, match=words), bounded():
        require_bounded(folder, folder / "adapter_model.safetensors")


def test_an_adapter_is_held_to_bounds_before_peft_reads_it(bitsandbytes, dense, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    asked = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(asked | {"target_modules": ENDLESS}))
    with pytest.raises(AdapterError, match="may never end"):
        api.load(dense, "bitsandbytes", device="cpu", adapter=folder)


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
