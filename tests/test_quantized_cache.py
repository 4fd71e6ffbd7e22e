"""Quantized weights that are kept: the second load is the first one's model, and never that of anything else."""

import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import polyquant
import pytest
import torch
from polyquant.errors import ConfigError, EnvironmentProblem, PolyquantError
from polyquant.loading import entries, quantized_cache
from polyquant.packable import PackableOptions
from polyquant.packed_weights import kernels
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.support.cache import cache_folder
from polyquant.support.files import once
from polyquant.testing import warm
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from . import zoo

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="polyquant-kernels is not here: nothing is kept")
FROM_CACHE = "come from the cache"


@pytest.fixture(autouse=True)
def everything_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(quantized_cache, "LEAST_BYTES", 0)
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(entries.SIZE, raising=False)


def load(path, backend="bitsandbytes:nf4", **options):
    return polyquant.load(path, backend, **{"kernel": "packed", "device": "cpu", **options})


def is_from_cache(loaded):
    return any(FROM_CACHE in note for note in loaded.notes)


def named(model):
    """Every tensor by its name, tied ones under each of theirs."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def configured(model):
    """A model's config as JSON has it, but for what only objects of transformers have besides."""
    found = json.loads(json.dumps(model.config.to_dict(), default=str))
    found["quantization_config"].pop("compute_dtype", None)
    return found


def assert_same(one, other):
    mine, theirs = named(one.model), named(other.model)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        now = theirs[name]
        assert (tensor.dtype, tensor.shape, tensor.requires_grad) == (now.dtype, now.shape, now.requires_grad), name
        assert torch.equal(tensor.detach().view(-1).view(torch.uint8), now.detach().view(-1).view(torch.uint8)), name
    assert {name: type(each) for name, each in one.model.named_modules()} == {
        name: type(each) for name, each in other.model.named_modules()
    }
    tokens = list(range(3, 20))
    assert torch.equal(one.logits(tokens), other.logits(tokens))
    assert one.generate("a b c", max_new_tokens=4) == other.generate("a b c", max_new_tokens=4)
    assert one.layers == other.layers
    assert one.kernel == other.kernel
    assert one.config == other.config
    assert configured(one.model) == configured(other.model)
    mine, theirs = (each.model.config.quantization_config for each in (one, other))
    assert type(mine) is type(theirs)
    assert one.model.generation_config.to_dict() == other.model.generation_config.to_dict()
    assert one.model.training == other.model.training is False


CASES = [
    ("llama", "bitsandbytes:nf4", {}),
    ("llama", "bitsandbytes:nf4", {"embeddings": "8bit", "head": "4bit"}),
    ("llama", "bitsandbytes:nf4", {"embeddings": "keep", "head": "keep", "skip": "k_proj"}),
    ("llama", "hqq:int8", {}),
    ("qwen2", "gguf:Q4_0", {}),
    ("qwen2", "bitsandbytes:nf4", {"embeddings": "8bit"}),
    ("qwen2", "bitsandbytes:nf4", {"embeddings": "keep"}),
    ("odd", "bitsandbytes:int8", {}),
]
"""Models, backends and options: tied and untied heads, biases, widths that fill no block."""


@pytest.mark.parametrize(("name", "backend", "options"), CASES, ids=[f"{a}-{b}-{len(c)}" for a, b, c in CASES])
def test_the_second_load_is_the_first_ones_model(tiny_model, name, backend, options):
    first = load(tiny_model(name), backend, **options)
    again = load(tiny_model(name), backend, **options)
    assert not is_from_cache(first)
    assert is_from_cache(again), first.notes
    assert [note for note in again.notes if FROM_CACHE not in note] == first.notes
    assert_same(first, again)
    report = polyquant.verify(again)
    assert report.passed, report
    assert [record.hook for record in again.records] == ["load"]
    assert again.records[0].peak_bytes


@pytest.mark.parametrize("vocabulary", ["8bit", "auto"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gemma3_text", "granitemoe"])
def test_experts_and_scaled_embeddings_too(tmp_path, name, vocabulary):
    ((kind, config, model_class),) = zoo.configs([name])
    path = zoo.build(config, model_class, tmp_path / kind)
    tied = config.get_text_config().tie_word_embeddings
    first, again = (load(path, embeddings=vocabulary, **({} if tied else {"head": vocabulary})) for _ in range(2))
    assert is_from_cache(again), first.notes
    assert_same(first, again)


EVERY = [
    info.name for info in polyquant.backends(on_the_fly=True)
    if issubclass(info.options, PackableOptions) and info.isolated is None
]  # fmt: skip


@pytest.mark.parametrize("backend", EVERY)
def test_of_every_backend_that_quantizes_while_loading(tiny_model, backend):
    presets = polyquant.backend(backend).info.presets
    for preset in presets:
        try:
            first = load(tiny_model("llama"), f"{backend}:{preset}")
        except PolyquantError as error:
            assert "packed" in str(error) or isinstance(error, EnvironmentProblem), error
            continue
        again = load(tiny_model("llama"), f"{backend}:{preset}")
        left = [note for note in first.notes if "have no place in the packed layout" in note]
        assert is_from_cache(again) != bool(left), (preset, first.notes)
        if not left:
            assert_same(first, again)


def test_tensors_are_the_files_pages_and_nothing_is_quantized(tiny_model, monkeypatch):
    load(tiny_model("llama"))
    from polyquant.registry.backend import Backend

    monkeypatch.setattr(Backend, "load", lambda *arguments: pytest.fail("it quantized again"))
    again = load(tiny_model("llama"))
    modules = [each for each in again.model.modules() if isinstance(each, RepackedLinear)]
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        areas = [line.split() for line in mapped.read_text().splitlines() if quantized_cache.WEIGHTS in line]
        spans = [tuple(int(end, 16) for end in area[0].split("-")) for area in areas]
        places = [each.qweight.data_ptr() for each in modules]
        assert places
        assert all(any(start <= place < end for start, end in spans) for place in places)


def test_it_trains_merges_and_saves_as_any(tiny_model, tmp_path):
    first, again = (load(tiny_model("llama")) for _ in range(2))
    assert is_from_cache(again)
    written = [one.backend.save(one, tmp_path / name) for one, name in ((first, "first"), (again, "again"))]
    one, other = (load_file(folder / "model.safetensors") for folder in written)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)
    model = again.backend.prepare_for_training(again)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tokens = torch.tensor([[3, 4, 5]])
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert bool(embedded.grad.abs().sum() > 0)


def other_seed(path, out):
    """A copy of a checkpoint with one other number."""
    once(out, lambda partial: [(partial / file.name).write_bytes(file.read_bytes()) for file in path.iterdir()])
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_anything_that_differs_is_quantized_anew(tiny_model, tmp_path, monkeypatch):
    path = other_seed(tiny_model("llama"), tmp_path / "model")
    load(path)
    for different in (
        lambda: load(path, skip="k_proj"),
        lambda: load(path, "bitsandbytes:int8"),
        lambda: load(path, embeddings="keep"),
        lambda: load(tiny_model("llama")),
    ):
        assert not is_from_cache(different())
    assert is_from_cache(load(path))
    tensors = load_file(path / "model.safetensors")  # the same size, a moment later
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    changed = load(path)
    assert not is_from_cache(changed)
    assert torch.equal(changed.model.model.norm.weight, tensors["model.norm.weight"].to(torch.float32))
    versions = quantized_cache._versions
    monkeypatch.setattr(quantized_cache, "_versions", lambda backend: {**versions(backend), "torch": "9"})
    assert not is_from_cache(load(path))


def test_it_is_left_out_where_it_is_not_wanted_or_not_the_same_thing(tiny_model, monkeypatch):
    path = tiny_model("llama")
    for options in ({"cache": False}, {"kernel": "library"}, {"trust_remote_code": True}):
        load(path, **options)
        assert not entries.kept()
    monkeypatch.setattr(quantized_cache, "LEAST_BYTES", 2**26)
    load(path)
    assert not entries.kept()
    monkeypatch.setattr(quantized_cache, "LEAST_BYTES", 0)
    load(path)
    assert len(entries.kept()) == 1
    assert not is_from_cache(load(path, cache=False))


def weights_of(entry):
    return Path(entry.folder) / quantized_cache.WEIGHTS


@pytest.mark.parametrize("damage", ["cut", "altered", "gone", "entry", "modules"])
def test_what_is_damaged_is_made_again(tiny_model, damage):
    first = load(tiny_model("llama"))
    (entry,) = entries.kept()
    path = weights_of(entry)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "altered":
        content[-3000] ^= 1
        path.write_bytes(content)
    elif damage == "gone":
        path.unlink()
    else:
        (path.parent / f"{damage}.json").write_text("{")
    again = load(tiny_model("llama"))
    assert not is_from_cache(again)
    assert_same(first, again)
    assert is_from_cache(load(tiny_model("llama"))), again.notes


def test_the_least_recently_used_go(tiny_model, monkeypatch):
    path = tiny_model("llama")
    load(path)
    (one,) = entries.kept()
    monkeypatch.setenv(entries.SIZE, str(int(one.entry.stored_bytes * 2.5)))
    load(path, skip="k_proj")
    os.utime(Path(one.folder) / entries.ENTRY, (time.time() + 60,) * 2)  # used since
    load(path, skip="v_proj")
    assert one.key in {each.key for each in entries.kept()}
    assert len(entries.kept()) == 2
    monkeypatch.setenv(entries.SIZE, "1KiB")
    large = load(path, skip="o_proj")
    assert any("not kept for the next load: " in note and entries.SIZE in note for note in large.notes)
    monkeypatch.setenv(entries.SIZE, "much")
    with pytest.raises(ConfigError, match="a size is written as 6GiB"):
        load(path, skip="q_proj")


def test_a_cache_that_cannot_be_written_to_is_said(tiny_model, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / entries.FOLDER).write_text("no folder")
    loaded = load(tiny_model("llama"))
    assert any(note.startswith("not kept for the next load: ") for note in loaded.notes), loaded.notes


def test_a_cache_that_may_only_be_read_is_used(tiny_model, monkeypatch):
    first = load(tiny_model("llama"))
    (kept,) = entries.kept()
    (Path(kept.folder) / quantized_cache.PROVEN).unlink(missing_ok=True)

    def refuse(*ignored, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    again = load(tiny_model("llama"))
    assert is_from_cache(again)
    assert_same(first, again)


LOADS = """
import sys, polyquant
from polyquant.loading import quantized_cache
quantized_cache.LEAST_BYTES = 0
print("ready", flush=True)
loaded = polyquant.load(sys.argv[1], "bitsandbytes:nf4", kernel="packed", device="cpu")
print(loaded.notes)
"""


def test_two_makers_at_once_make_one(tiny_model):
    command = [warm.interpreter(), "-c", LOADS, str(tiny_model("llama"))]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [each.communicate(timeout=300)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0]
    assert all("not kept" not in text for text in said), said
    assert len(entries.kept()) == 1
    assert is_from_cache(load(tiny_model("llama")))


KILLED = """
import os, signal
from polyquant.packed_weights import tensor_file
from polyquant.support import files
kill = lambda *ignored, **more: os.kill(os.getpid(), signal.SIGKILL)
"""
MOMENTS = {
    "writing": "tensor_file.TensorWriter.add = kill",
    "before its entry": "quantized_cache.Entry = kill",
    "synchronizing": "os.fsync = kill",
    "before it takes its place": "files._swap = kill",
    "marking": "files.mark = kill",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kills_leave_nothing_that_is_taken_for_whole(tiny_model, moment):
    code = LOADS.replace('print("ready", flush=True)', f"{KILLED}{MOMENTS[moment]}")
    for _ in range(2):
        killed = warm.run(["-c", code, str(tiny_model("llama"))], seconds=300)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not entries.kept()
    again = load(tiny_model("llama"))
    assert not is_from_cache(again)
    assert is_from_cache(load(tiny_model("llama")))
    assert not list((cache_folder() / entries.FOLDER).glob(".*partial*/"))


def test_the_file_is_one_of_safetensors(tiny_model):
    loaded = load(tiny_model("llama"))
    (entry,) = entries.kept()
    with safe_open(weights_of(entry), framework="pt") as file:
        names = set(file.keys())
    assert "model.layers.0.self_attn.q_proj.qweight" in names
    assert names <= named(loaded.model).keys()
    assert entry.entry.stored_bytes == weights_of(entry).stat().st_size


def test_the_commands(tiny_model, run_python):
    load(tiny_model("llama"))
    load(tiny_model("llama"), "hqq:int4")
    first, second = entries.kept()
    listed = run_python("cache", "list")
    assert listed.returncode == 0, listed.stderr
    assert "2 kept, " in listed.stdout
    assert "of 20.0 GiB (POLYQUANT_CACHE_SIZE)" in listed.stdout
    assert f"{second.key[:12]}  " in listed.stdout
    assert json.loads(run_python("cache", "list", "--json").stdout)[0]["key"] == first.key
    assert run_python("cache", "path").stdout.strip() == str(cache_folder())
    unknown = run_python("cache", "rm", "nothing")
    assert unknown.returncode == 2
    assert "there are " in unknown.stderr
    assert run_python("cache", "rm").returncode == 2
    assert "deleted" in run_python("cache", "rm", first.key[:8]).stdout
    assert [each.key for each in entries.kept()] == [second.key]
    run_python("cache", "rm", "--all")
    assert not entries.kept()
    assert run_python("cache", "list").stdout.startswith("0 kept, 0 B of ")
