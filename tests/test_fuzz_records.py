"""Fuzz tests of what polyquant and its users write: adapters, training data and states, references, comparisons."""

import hashlib
import json
import struct

import msgspec
import polyquant
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from polyquant.registry.installed import registry
from polyquant.comparison import candidates
from polyquant.cli import comparing
from polyquant.comparison import reference, store
from polyquant.comparison.records import Job, ReferenceJob, Result, Row, Setting
from polyquant.comparison.result import Comparison
from polyquant.errors import PolyquantError
from polyquant.finetuning import data, state
from polyquant.loading import adapter
from polyquant.finetuning.options import TrainingOptions
from polyquant.loading.adapter import Card
from polyquant.support.machine import this_machine
from polyquant.measure.quality import stored
from polyquant.measure.quality.index import StoredReference, stored_in
from polyquant.measure.quality.windows import Window
from polyquant.testing.models import tiny_model
from safetensors.torch import save
from transformers import LlamaConfig, LlamaForCausalLM

from .fuzzing import RAW, SETTINGS, TEXTS, VALUES, damaged, guarded, json_files, mutated


def plain(record):
    return msgspec.to_builtins(record)


JOB = Job(model="m", backend="dense", options={"compute_dtype": "float32"})
RESULT = Result(job=JOB, status="done", parts=("speed",), load_seconds=1.0, checks=(), notes=("a",))
CARD = Card(
    base_model="m", base_hash="0" * 64, architecture="LlamaForCausalLM", backend="rowwise", backend_options={"bits": 8},
    training=TrainingOptions(), data_hash="1", examples=3, versions={"torch": "2"},
)  # fmt: skip


# adapters


@settings(**SETTINGS)
@given(content=json_files(plain(CARD)))
@example(content=b"[" * 60_000)
@example(content=b'{"base_model": "\xff"}')
@example(content=json.dumps(plain(CARD) | {"training": {"patience": 3}}).encode())
def test_adapter_cards(tmp_path, content):
    (tmp_path / "polyquant.json").write_bytes(content)
    with guarded(tmp_path, len(content)):
        assert isinstance(adapter.read_card(tmp_path), Card)


ADAPTER = {
    "peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {},
    "modules_to_save": None, "layer_replication": None, "bias": "none",
}  # fmt: skip
MODEL = LlamaForCausalLM(
    LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16, intermediate_size=16)
)
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
NAMES = st.sampled_from([f"{LORA}A.weight", f"{LORA}B.weight", "base_model.model.x.lora_A.weight", "q"])


@st.composite
def adapter_weights(draw):
    shapes = st.lists(st.integers(0, 8), max_size=3)
    return save(
        {name: torch.zeros(draw(shapes)) for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))}
    )


@settings(**SETTINGS)
@given(content=st.one_of(adapter_weights(), damaged(adapter_weights()), st.binary(max_size=40)))
@example(content=struct.pack("<Q", 2**63) + b"{}")
@example(content=save({f"{LORA}A.weight": torch.zeros(())}))
def test_adapter_weights(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with guarded(tmp_path, len(content)):
        adapter._require_fit(MODEL, adapter.located(str(tmp_path)))


@settings(**SETTINGS)
@given(content=json_files(ADAPTER))
@example(content=json.dumps(ADAPTER | {"layer_replication": [[0, 10**9]]}).encode())
@example(content=json.dumps(ADAPTER | {"target_modules": "(q|q)*" * 40}).encode())
@example(content=json.dumps(ADAPTER | {"peft_type": "LOHA"}).encode())
def test_adapter_configs(tmp_path, content):
    """What PEFT is given is bounded: its kind, its patterns, how many layers it makes."""
    (tmp_path / "adapter_config.json").write_bytes(content)
    (tmp_path / "adapter_model.safetensors").write_bytes(save({f"{LORA}A.weight": torch.zeros(4, 8)}))
    with guarded(tmp_path, len(content)):
        adapter._require_fit(MODEL, adapter.located(str(tmp_path)))


# training


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama", tmp_path_factory.mktemp("tiny")))
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
        "{% if message['role'] == 'system' and not loop.first %}{{ raise_exception('only first') }}{% endif %}{% endfor %}"
    )
    return tokenizer


RECORDS = st.one_of(
    mutated({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
    mutated({"prompt": "a", "completion": "b"}),
    mutated({"text": "a b c"}),
    VALUES,
)
SURROGATE = b'{"text": "\\ud800"}'


@settings(**SETTINGS)
@given(lines=st.lists(st.one_of(RECORDS.map(lambda value: json.dumps(value).encode()), RAW), max_size=4))
@example(lines=[b'{"messages": [{"role": "assistant", "content": "b"}, {"role": "system", "content": "late"}]}'])
@example(lines=[SURROGATE])
@example(lines=[b'{"text": "\xff"}'])
def test_training_data(tmp_path, tokenizer, lines):
    content = b"\n".join(lines)
    (tmp_path / "data.jsonl").write_bytes(content)
    with guarded(tmp_path, len(content) + 2**16):
        examples = data.read_examples(tmp_path / "data.jsonl", tokenizer, TrainingOptions(truncate=True), 64)
        assert all(len(each.input_ids) == len(each.labels) <= 64 for each in examples.examples)


@settings(**SETTINGS)
@given(content=json_files({"model": "m", "options": {"bits": 4}, "data": "x"}))
@example(content=b"[1]")
def test_unfinished_runs(tmp_path, content):
    folder = state.working_folder(tmp_path / "out")
    folder.mkdir(exist_ok=True)
    (folder / "job.json").write_bytes(content)
    with guarded(tmp_path, len(content)):
        assert state.begin(tmp_path / "out", {"model": "m"}, restart=False) == folder


@settings(**SETTINGS)
@given(
    content=RAW,
    weights=damaged(adapter_weights()),
    name=st.sampled_from(["checkpoint-1", "checkpoint-x", "checkpoint-", "checkpoint-9"]),
)
@example(content=b'{"a": "\xff"}', weights=save({"a": torch.zeros(1)}), name="checkpoint-1")
def test_half_written_checkpoints(tmp_path, content, weights, name):
    path = tmp_path / "run" / name
    path.mkdir(parents=True, exist_ok=True)
    for part in state.PARTS:
        (path / part).write_bytes(weights if part.endswith("safetensors") else content)
    with guarded(tmp_path, len(content) + len(weights)):
        whole, notes = state.last_whole_checkpoint(tmp_path / "run")
        assert bool(whole) or notes or name not in ("checkpoint-1", "checkpoint-9")


# references


INDEX = plain(
    StoredReference(key="k", preset="llamacpp-512", windows=[Window((1, 2, 3), 1)], vocabulary=4, storage_error=0.0)
)  # fmt: skip


@settings(**SETTINGS)
@given(content=json_files(INDEX))
@example(content=b"[" * 60_000)
@example(content=b'{"key": "\xff"}')
@example(content=json.dumps(INDEX | {"windows": [[[1, 2, 3], -5]]}).encode())
@example(content=json.dumps(INDEX | {"windows": [[[], 0]]}).encode())
def test_reference_indexes(tmp_path, content):
    (tmp_path / "reference.json").write_bytes(content)
    window = {"codes": torch.zeros(2, 4, dtype=torch.uint16), "low": torch.zeros(2, 1), "step": torch.ones(2, 1)}
    (tmp_path / "window-00000.safetensors").write_bytes(save(window))
    job = ReferenceJob(
        model="m", text="", preset="llamacpp-512", limit=None, candidate=reference.DENSE_FLOAT32, device="cpu",
        folder=str(tmp_path), key="k",
    )  # fmt: skip
    with guarded(tmp_path, len(content)):
        assert reference.is_stored(job) in (True, False)
        index = stored_in(tmp_path, "k")
        if index is not None:
            for read, rows in stored.read(tmp_path, index):
                assert rows.shape == (read.scored, index.vocabulary)
                assert 1 <= read.first_scored <= len(read.tokens)


@settings(**SETTINGS)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=3, max_size=3),
    change=st.booleans(),
    hold=st.data(),
)
def test_reference_windows(tmp_path, shapes, change, hold):
    names = ("codes", "low", "step")
    content = save({name: torch.zeros(shape) for name, shape in zip(names, shapes, strict=True)})
    if change:
        content = hold.draw(damaged(st.just(content)))
    (tmp_path / "window-00000.safetensors").write_bytes(content)
    index = msgspec.convert(INDEX, StoredReference)
    with guarded(tmp_path, len(content)):
        ((_, rows),) = stored.read(tmp_path, index)
        assert rows.shape == (2, 4)


# comparisons


@settings(**SETTINGS)
@given(content=json_files(plain(RESULT)), true=st.booleans())
def test_cells(tmp_path, content, true):
    path = tmp_path / "cell.json"
    checksum = hashlib.sha256(content).hexdigest()
    path.write_bytes(b'{"checksum": "%s", "result": %s}' % (checksum.encode(), content) if true else content)
    with guarded(tmp_path, len(content)):
        found = store.read_cell(path)
        assert found.result is not None or found.note


@settings(**SETTINGS)
@given(content=json_files({"job": plain(JOB), "status": "done"}))
@example(content=msgspec.json.encode(RESULT))
def test_cells_that_are_true(tmp_path, content):
    """A cell with the right checksum is read as it was written, or is no result."""
    (tmp_path / "cell.json").write_bytes(
        b'{"checksum": "%s", "result": %s}' % (hashlib.sha256(content).hexdigest().encode(), content)
    )
    with guarded(tmp_path, len(content)):
        found = store.read_cell(tmp_path / "cell.json")
        assert found.result is not None or found.note
        if found.result is not None:
            assert msgspec.json.decode(content, type=Result) == found.result


COMPARISON = {
    "version": "0.1.0", "created": "2026-01-01T00:00:00Z", "folder": "f", "command": "c",
    "setting": {"model": "m", "model_hash": "h", "device": "cpu", "parts": ["speed"], "preset": "llamacpp-512", "text": "t",
                "windows": 0, "reference": "dense"},
    "machine": plain(this_machine()),
    "rows": [{"candidate": {"name": "dense", "backend": "dense"}, "key": "k", "command": "c", "result": plain(RESULT)}],
}  # fmt: skip


@settings(**SETTINGS)
@given(content=json_files(COMPARISON))
@example(content=b"[" * 60_000)
@example(content=b'{"version": "\xff"}')
def test_comparisons(tmp_path, content):
    (tmp_path / "comparison.json").write_bytes(content)
    with guarded(tmp_path, len(content)):
        comparison = polyquant.read_comparison(tmp_path)
        assert isinstance(comparison, Comparison)
        assert isinstance(comparison.setting, Setting)
        assert all(isinstance(row, Row) for row in comparison.rows)


def test_the_comparison_that_is_made_worse_is_a_good_one(tmp_path):
    (tmp_path / "comparison.json").write_text(json.dumps(COMPARISON))
    assert polyquant.read_comparison(tmp_path).rows[0].result.job.backend == "dense"


TOML = """
model = "m"
windows = 3
candidates = ["dense:float32", {backend = "bitsandbytes", preset = "nf4", double_quant = true, name = "mine"}]
out = "there"
"""
WORDS = st.sampled_from(
    ["model", "windows", "candidates", "out", "=", "[", "]", "[[", "]]", "{", "}", '"', "3", "1e999", "true", "backend",
     "bitsandbytes", "preset", "bits", "\n", ",", ".", "😀", "2026-01-01"]
)  # fmt: skip


@settings(**SETTINGS)
@given(
    content=st.one_of(
        damaged(st.just(TOML.encode())), st.lists(WORDS, max_size=12).map(lambda each: " ".join(each).encode()), RAW
    )
)
@example(content=TOML.encode())
@example(content=b"candidates = [1]")
@example(content=b"candidates = 'dense'")
@example(content=b"model = [1]\nout = 3")
@example(content=b"candidates = " + b"[" * 5000)
@example(content=b"windows = 'many'")
def test_files_of_candidates(tmp_path, content):
    (tmp_path / "a.toml").write_bytes(content)
    with guarded(tmp_path, len(content)):
        written = comparing._read(tmp_path / "a.toml")
        found = [comparing._candidate(entry) for entry in written.get("candidates", ())]
        assert all(isinstance(each, (str, candidates.Candidate)) for each in found)


PARTS = st.sampled_from(
    ["bitsandbytes", "dense", "nf4", ":", "@", ",", "=", "bits", "4", "skip", "float16", "/", ".gguf", " ", "😀", "\0"]
)


@settings(**SETTINGS)
@given(text=st.one_of(st.lists(PARTS, max_size=8).map("".join), TEXTS))
def test_candidates(text):
    try:
        found = candidates.parse(text, registry().info)
    except PolyquantError as error:
        assert str(error)
    else:
        assert isinstance(found, candidates.Candidate)
