"""What the core does for a backend that works on GGUF files and on nothing dense, with a runtime that is not torch."""

from types import SimpleNamespace

import pytest
from polyquant.loading import load as loading
from polyquant.errors import CheckpointConflict, ConfigError, DenseModelError
from polyquant.loaded import LoadedModel
from polyquant.loading.load import LoadOptions
from polyquant.models.resolve import resolve
from polyquant.options import BackendOptions
from polyquant.request import ModelSource
from polyquant.types import Capabilities, DeviceSupport, LayerInfo

CARD = {"bits": (4,), "schemes": ("Q4_0",), "devices": (DeviceSupport(type="cpu"),), "torch_module": False}
CAPABILITIES = Capabilities(**CARD, loads_prequantized=("gguf",))


class Options(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: str = "file"

    @classmethod
    def from_stored(cls, stored):
        return cls(type="Q4_0")


class Runtime:
    """As much of a backend's handle as loading asks for."""

    name = "runtime"
    capabilities = CAPABILITIES
    info = SimpleNamespace(name=name, capabilities=CAPABILITIES, options=Options, compute_dtypes={"cpu": "float32"})

    def can(self, hook):
        return False

    def require(self, device):
        pass


@pytest.fixture
def gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    return resolve(tmp_path / "model.gguf")


def prepare(source, given, *, to_quantize=False, **how):
    options = LoadOptions(device="cpu", **how)
    return loading.prepare(source, Runtime(), Options(**given), given, options, to_quantize=to_quantize)


def test_who_works_on_gguf_only():
    assert CAPABILITIES.only_gguf
    assert not Capabilities(**CARD, loads_prequantized=("gguf",), on_the_fly=True).only_gguf
    assert not Capabilities(**CARD, loads_prequantized=("gguf", "gptq")).only_gguf


def test_a_builtin_model_is_its_packaged_gguf(monkeypatch, tmp_path):
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path))
    source = resolve("builtin:smollm2", as_gguf=True)
    assert source.name == "builtin:smollm2"
    assert source.gguf_file.endswith(".gguf")
    assert not list(tmp_path.iterdir()), "no dense checkpoint is made of it"


def test_a_dense_model_is_refused_with_the_way_to_a_gguf(tmp_path):
    source = ModelSource(name="dense", path=tmp_path, config={"model_type": "llama"})
    with pytest.raises(CheckpointConflict, match="polyquant quantize dense --backend gguf --out DIR"):
        prepare(source, {})


def test_the_type_of_a_gguf_cannot_be_chosen_when_it_is_loaded_and_can_when_it_is_quantized(gguf):
    with pytest.raises(CheckpointConflict, match="type: requested 'Q8_0', stored 'Q4_0'"):
        prepare(gguf, {"type": "Q8_0"})
    request, config, _ = prepare(gguf, {"type": "Q8_0", "skip": ("blk.0",)}, to_quantize=True)
    assert request.source == gguf
    assert (config.type, config.skip, config.compute_dtype) == ("Q8_0", ("blk.0",), "float32")


def test_a_backend_without_a_plan_takes_large_files_and_no_limits(gguf, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10))
    request, _, _ = prepare(gguf, {})
    assert request.device_map == {"": "cpu"}
    with pytest.raises(ConfigError, match="runtime does not plan its memory, so max_memory cannot be kept"):
        prepare(gguf, {}, max_memory={"cpu": "1GiB"})


def test_a_dense_file_needs_a_word_here_too():
    layer = LayerInfo(
        name="output.weight", shape=(2, 2), role="head", bits=16, scheme="float16", stored_bytes=8, parts={"blocks": 8},
        device="cpu", quantized=False, reason="dense in the file",
    )  # fmt: skip
    loaded = LoadedModel(
        model=None, tokenizer=None, config=Options(), kernel="", initial_layers=[layer], _backend=Runtime()
    )
    with pytest.raises(DenseModelError, match="allow_dequantize=True"):
        loading._require_quantized(loaded, allowed=False)
    loading._require_quantized(loaded, allowed=True)
    assert "dense" in loaded.notes[-1]
