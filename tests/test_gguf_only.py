"""What the core does for a backend that works on GGUF files and on nothing dense, with a runtime that is not torch."""

from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGUFWriter
from polyquant.loading import load as loading
from polyquant.errors import CheckpointConflict, ConfigError, DenseModelError
from polyquant.loaded import LoadedModel
from polyquant.loading.options import LoadOptions
from polyquant.loading.settle import route_of
from polyquant.models.model import Model
from polyquant.models.outline import Outline
from polyquant.models.resolve import resolve
from polyquant.options import BackendOptions
from polyquant.request import ModelSource
from polyquant.types import Capabilities, DeviceSupport, LayerInfo

CARD = {"bits": (4,), "schemes": ("Q4_0",), "devices": (DeviceSupport(type="cpu"),), "runtime": "other"}
CAPABILITIES = Capabilities(**CARD, loads_prequantized=("gguf",), makes_from="gguf")


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
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("output.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Model.find(tmp_path / "model.gguf")


def prepare(model, given, *, to_quantize=False, **how):
    options, route = LoadOptions(device="cpu", **how), route_of(model.source, Runtime(), to_quantize=to_quantize)
    return loading.prepare(model, Runtime(), Options(**given), given, options, route)


def test_a_builtin_model_is_its_packaged_gguf(monkeypatch, tmp_path):
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path))
    source = resolve("builtin:smollm2")
    assert source.name == "builtin:smollm2"
    assert source.gguf_file.endswith(".gguf")
    assert not list(tmp_path.iterdir()), "no dense checkpoint is made of it"


def test_a_dense_model_is_refused_with_the_way_to_a_gguf(tmp_path):
    source = ModelSource(name="dense", path=tmp_path, config={"model_type": "llama"})
    with pytest.raises(CheckpointConflict, match="polyquant quantize dense --backend gguf --out DIR"):
        loading.load_model(Model(Outline(source, {}, 0)), Runtime(), Options(), {}, LoadOptions(device="cpu"))


def test_the_type_of_a_gguf_cannot_be_chosen_when_it_is_loaded_and_can_when_it_is_quantized(gguf):
    with pytest.raises(CheckpointConflict, match="type: requested 'Q8_0', stored 'Q4_0'"):
        prepare(gguf, {"type": "Q8_0"})
    request, settled = prepare(gguf, {"type": "Q8_0", "skip": ("blk.0",)}, to_quantize=True)
    assert (request.source, request.weights, settled.route) == (gguf.source, (), "make first")
    config = settled.options
    assert (config.type, config.skip, config.compute_dtype) == ("Q8_0", ("blk.0",), "float32")


def test_a_backend_without_a_plan_takes_large_files_and_no_limits(gguf, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10))
    request, _ = prepare(gguf, {})
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
