"""Models larger than the memory they are given: packed blocks read from the disk for each token, the same answers."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import polyquant
import pytest
import torch
from polyquant.errors import ConfigError, ModelError, PlacementError, SaveError
from polyquant.loading import disk, entries, quantized_cache
from polyquant.memory.on_disk import AT_ONCE, block_of, split
from polyquant.memory.peak import measure_peak
from polyquant.packed_weights import kernels, step
from polyquant.support.cache import cache_folder
from polyquant.support.disk import KEPT, read_rate

from . import zoo

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="polyquant-kernels is not here: nothing is kept")
TOKENS = list(range(3, 20))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(entries.SIZE, raising=False)


def deeper(path, out):
    """A model like another, of four blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(path, out)
    stored = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**stored, "num_hidden_layers": 4, "layer_types": None}))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out)).save_pretrained(out)
    AutoTokenizer.from_pretrained(path).save_pretrained(out)
    return out


@pytest.fixture
def llama(tiny_model, tmp_path):
    return deeper(tiny_model("llama"), tmp_path / "llama")


def load(path, backend="bitsandbytes:nf4", **options):
    return polyquant.load(path, backend, **{"kernel": "packed", "device": "cpu", **options})


def least(path, backend="bitsandbytes:nf4", **options):
    """Room for what stays and the blocks that are read, of a model all of whose blocks are on disk."""
    plan = polyquant.plan(path, backend, kernel="packed", device="cpu", **options)
    return split(plan.tensors, 1).resident_bytes


def from_disk(path, backend="bitsandbytes:nf4", **options):
    room = least(path, backend, **options)
    loaded = load(path, backend, offload="disk", max_memory={"cpu": room}, **options)
    assert len(loaded.request.on_disk) == loaded.model.config.num_hidden_layers
    return loaded


@pytest.fixture
def deep(tmp_path, tiny_model):
    """A model of twelve equal blocks of 2.3 MB in NF4."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "deep")
    AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


CASES = [("llama", "bitsandbytes:nf4", {}), ("qwen2", "hqq:int8", {"embeddings": "8bit"}), ("llama", "gguf:Q4_0", {})]


@pytest.mark.parametrize(("name", "backend", "options"), CASES, ids=[each[1] for each in CASES])
def test_the_same_answers_bit_for_bit(tiny_model, tmp_path, monkeypatch, name, backend, options):
    path = deeper(tiny_model(name), tmp_path / "model")
    first, again = (from_disk(path, backend, **options) for _ in range(2))
    whole = load(path, backend, cache=False, **options)
    assert first.kernel == again.kernel == f"{kernels.name()}, blocks from disk"
    told = [note for note in first.notes if "stay on disk: " in note and "are read for each token" in note]
    assert told, first.notes
    assert any("come from the cache" in note for note in again.notes)
    assert not any("come from the cache" in note for note in first.notes)
    for one in (first, again):
        assert one.generate("a b c", max_new_tokens=8) == whole.generate("a b c", max_new_tokens=8)
        assert polyquant.verify(one).passed
        assert one.layers == whole.layers
    monkeypatch.setattr(step, "attach", lambda model: False)
    by_module = load(path, backend, cache=False, **options)
    assert torch.equal(first.logits(TOKENS), by_module.logits(TOKENS))
    assert torch.equal(again.logits(TOKENS), by_module.logits(TOKENS))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_too(tmp_path, monkeypatch, name):
    ((kind, config, model_class),) = zoo.configs([name])
    path = deeper(zoo.build(config, model_class, tmp_path / kind), tmp_path / "deeper")
    monkeypatch.setattr(step, "attach", lambda model: False)
    whole, parts = load(path, cache=False), from_disk(path)
    assert torch.equal(whole.logits(TOKENS), parts.logits(TOKENS))
    plans = polyquant.plan(path, "bitsandbytes:nf4", kernel="packed", device="cpu").tensors
    found = split(plans, 1, experts_per_token=2)
    assert found.read_bytes < split(plans, 1).read_bytes == found.disk_bytes


def test_checkpoints_that_are_quantized_already(llama, tmp_path, monkeypatch):
    saved = load(llama, cache=False).save(tmp_path / "saved")
    monkeypatch.setattr(step, "attach", lambda model: False)
    whole, parts = load(saved, "bitsandbytes", cache=False), from_disk(saved, "bitsandbytes")
    assert parts.kernel.endswith("blocks from disk")
    assert torch.equal(whole.logits(TOKENS), parts.logits(TOKENS))


def test_it_runs_in_less_memory_than_its_packed_weights(deep):
    def grown(**options):
        with measure_peak() as peak:
            loaded = load(deep, **options)
            text = loaded.generate("a b c", max_new_tokens=4)
        if peak.peak_bytes is None:
            pytest.skip("this system gives no peak that can be reset")
        return peak.peak_bytes - peak.held_bytes, text, loaded

    room = least(deep)
    first = load(deep, offload="disk", max_memory={"cpu": room})
    packed = sum(layer.stored_bytes for layer in first.layers if layer.quantized)
    del first
    small, text, loaded = grown(offload="disk", max_memory={"cpu": room})
    assert len(loaded.request.on_disk) == 12
    assert small < packed / 2, (small, packed)
    del loaded
    large, same, loaded = grown()
    assert any("come from the cache" in note for note in loaded.notes)
    assert large > packed, (large, packed)
    assert text == same


def test_what_fits_stays(tiny_model):
    path = tiny_model("llama")
    everything = load(path, offload="disk")
    assert not everything.request.on_disk
    assert any("everything fits, " in note and "nothing is read from the disk" in note for note in everything.notes)
    assert "whole steps" in everything.kernel


def test_which_blocks_are_read(deep):
    plan = polyquant.plan(deep, "bitsandbytes:nf4", kernel="packed", device="cpu")
    whole, rest = split(plan.tensors, plan.weights_planned_bytes), split(plan.tensors, 1)
    assert (whole.on_disk, whole.resident_bytes) == ((), plan.weights_planned_bytes)
    assert rest.on_disk == tuple(f"model.layers.{number}" for number in range(12))
    block = rest.disk_bytes // 12
    assert rest.resident_bytes == plan.weights_planned_bytes - rest.disk_bytes + AT_ONCE * block
    three = split(plan.tensors, rest.resident_bytes + 3 * block)
    assert three.on_disk == rest.on_disk[3:]
    assert three.read_bytes == three.disk_bytes == 9 * block
    assert [block_of(name) for name in ("model.layers.10.mlp.up.weight", "lm_head.weight")] == ["model.layers.10", ""]


def test_a_plan_says_what_stays_and_what_is_read(deep, monkeypatch):
    monkeypatch.setattr("polyquant.planning.model.bare_bytes", lambda: 2**29)
    usual = polyquant.plan(deep, "bitsandbytes:nf4", kernel="packed", device="cpu", context=64)
    budget = usual.needed_bytes - 10 * 2**20
    assert not polyquant.plan(deep, "bitsandbytes:nf4", kernel="packed", device="cpu", context=64, memory=budget).fits
    plan = polyquant.plan(
        deep, "bitsandbytes:nf4", kernel="packed", device="cpu", context=64, memory=budget, offload="disk"
    )
    assert plan.fits
    assert 0 < len(plan.on_disk) < 12
    assert plan.read_bytes_per_token == len(plan.on_disk) * (split(plan.tensors, 1).disk_bytes // 12)
    assert plan.disk_tokens_per_second == plan.disk_bytes_per_second / plan.read_bytes_per_token > 0
    (note,) = [note for note in plan.notes if "stay on disk" in note]
    room = int(note.rpartition("--max-memory cpu=")[2].rstrip(")"))
    loaded = load(deep, offload="disk", max_memory={"cpu": room})
    assert loaded.request.on_disk == plan.on_disk


def test_the_rate_of_a_disk_is_measured_once(tmp_path, monkeypatch):
    rate = read_rate(tmp_path / "there")
    assert rate > 2**20
    assert (cache_folder() / KEPT).exists()
    assert read_rate(tmp_path / "there") == rate
    (cache_folder() / KEPT).write_text("{")
    assert read_rate(tmp_path) > 2**20
    assert read_rate(Path("/proc/nothing")) is None


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kernel": "library"}, ConfigError, "reads layers in the packed layout: take kernel='packed'"),
        ({"device_map": {"": "cpu"}}, ConfigError, "leave device_map out"),
        ({"max_memory": {0: "1GiB", "cpu": "1GiB"}}, ConfigError, "max_memory is of the cpu alone, got 0, cpu"),
        ({"max_memory": {"cpu": 1}}, PlacementError, "of memory even with offload='disk'"),
    ],
)
def test_what_cannot_be(llama, options, error, words):
    with pytest.raises(error, match=words):
        load(llama, offload="disk", **options)
    assert not entries.kept()


def test_without_the_cache_it_cannot_be(llama, monkeypatch):
    path, room = llama, {"cpu": least(llama)}
    for option in ("cache", "trust_remote_code"):
        with pytest.raises(ConfigError, match=f"nothing is kept there with {option}"):
            load(path, offload="disk", max_memory=room, **{option: option != "cache"})
    monkeypatch.setenv(entries.SIZE, "1KiB")
    with pytest.raises(PlacementError, match=f"in the cache of quantized weights, and {entries.SIZE} is 1.0 KiB"):
        load(path, offload="disk", max_memory=room)
    monkeypatch.delenv(entries.SIZE)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(PlacementError, match="0 B are free there: make room, or set POLYQUANT_CACHE"):
        load(path, offload="disk", max_memory=room)
    with monkeypatch.context() as enough:
        enough.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 0, 2**30))
        load(path, offload="disk", max_memory=room)
    again = load(path, offload="disk", max_memory=room)  # nothing is written any more
    assert any("come from the cache" in note for note in again.notes)


def test_what_does_not_fit_is_refused_with_what_would(llama):
    path = llama
    small = {"cpu": polyquant.plan(path, "bitsandbytes:int8", kernel="packed", device="cpu").weights_planned_bytes - 1}
    with pytest.raises(PlacementError, match=r"What would fit: bitsandbytes:nf4 .*offload='disk' \(--offload disk\)"):
        load(path, "bitsandbytes:int8", max_memory=small)
    with pytest.raises(PlacementError, match="None of bitsandbytes's presets would fit; polyquant plan"):
        load(path, max_memory={"cpu": 1})
    assert not entries.kept()


def weights():
    (entry,) = entries.kept()
    return Path(entry.folder) / quantized_cache.WEIGHTS


def test_a_file_that_changes_under_a_running_model_is_told(llama):
    loaded = from_disk(llama)
    before = loaded.logits(TOKENS)
    path = weights()
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(content) - 64)
        file.write(b"other")
    with pytest.raises(ModelError, match=r"was changed while the model was read from it: load the model again"):
        loaded.logits(TOKENS)
    again = from_disk(llama)
    assert torch.equal(again.logits(TOKENS), before)
    weights().unlink()  # which a model that has it open does not need
    assert torch.equal(again.logits(TOKENS), before)


def test_a_file_that_was_cut_short_is_made_again(llama):
    before = from_disk(llama).logits(TOKENS)
    path = weights()
    path.write_bytes(path.read_bytes()[:-100])
    again = from_disk(llama)
    assert not any("come from the cache" in note for note in again.notes)
    assert torch.equal(again.logits(TOKENS), before)


def test_a_cache_that_cannot_be_written_to_is_said(llama):
    cache_folder().mkdir(parents=True, exist_ok=True)
    (cache_folder() / entries.FOLDER).write_text("no folder")
    with pytest.raises(SaveError, match="in the user's cache, where they could not be written: .*POLYQUANT_CACHE"):
        from_disk(llama)


def limited():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))


FULL = """
import signal, sys, polyquant
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    polyquant.load(sys.argv[1], "bitsandbytes:nf4", kernel="packed", device="cpu", offload="disk", max_memory={"cpu": int(sys.argv[2])})
except polyquant.errors.SaveError as error:
    print(error)
"""


def test_a_disk_that_fills_up_meanwhile_is_said(llama):
    command = [sys.executable, "-c", FULL, str(llama), str(least(llama))]
    ran = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, timeout=300, env={**os.environ})
    assert "are free there: make room, or set POLYQUANT_CACHE" in ran.stdout, ran.stdout + ran.stderr
    assert not entries.kept()
