"""A loaded file: its layers and bytes, its options, and what is left when it is gone."""

import ctypes
import gc
import sys
from pathlib import Path

import polyquant
import pytest
from llama_cpp import llama_cpp as lib
from polyquant.errors import CheckpointConflict, ConfigError, DenseModelError, ModelError, PlacementError
from polyquant.models.gguf_header import read_header

from .conftest import load


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mmap", [True, False])
def test_a_deleted_model_is_gone(tiny, mmap):
    path = tiny("llama", "Q4_1")

    def mapped():
        return str(path) in Path("/proc/self/maps").read_text()

    loaded = load(path, mmap=mmap)
    finalizer, stream = loaded.model._finalizer, loaded.stream("The water", max_new_tokens=4)
    next(stream)
    assert mapped() == mmap
    del loaded, stream
    assert not finalizer.alive, "freed with the last reference, without the garbage collector"
    gc.collect()
    assert not mapped()


def test_nothing_is_printed_and_the_log_goes_where_it_went(tiny, capfd):
    def log():
        function, data = lib.llama_log_callback(), ctypes.c_void_p()
        lib.llama_log_get(ctypes.byref(function), ctypes.byref(data))
        return ctypes.cast(function, ctypes.c_void_p).value

    before = log()
    loaded = load(tiny("llama", "Q5_0"))
    loaded.generate("The water", max_new_tokens=4, repetition_penalty=1.1)
    with pytest.raises(ModelError):
        load(__file__)
    del loaded
    assert capfd.readouterr() == ("", "")
    assert log() == before


def test_layers_are_those_of_the_file(tiny):
    loaded = load(tiny("mixtral", "Q8_0"))
    layers, header = {layer.name: layer for layer in loaded.layers}, read_header(tiny("mixtral", "Q8_0"))
    assert set(layers) >= set(header.tensors)
    assert sum(layers[name].stored_bytes for name in header.tensors) == lib.llama_model_size(loaded.model.model)
    experts = layers["blk.0.ffn_up_exps.weight"]
    assert (experts.role, experts.shape, experts.scheme, experts.bits) == ("experts", (4, 512, 256), "Q8_0", 8)
    assert layers["token_embd.weight"].role == "embedding"
    assert layers["output.weight"].role == "head"
    assert layers["output_norm.weight"].reason
    assert not layers["blk.1.ffn_gate_inp.weight"].quantized


def test_repacked_weights_are_counted(tiny):
    """Only loaded: where the CPU has AMX, llama.cpp's kernels for it crash."""
    loaded = load(tiny("llama-tied", "Q4_0"), repack="on")
    beside = [
        layer for layer in loaded.layers if "copy for the output head" in str(layer.parts) or layer.role == "buffer"
    ]
    sizes = sum(float(size) for name, size in _buffers(loaded) if name not in ("CPU", "CPU_Mapped")) * 2**20
    if not sizes:
        pytest.skip("llama.cpp repacks nothing on this CPU")
    assert beside
    head, others = [0, 0]
    for layer in loaded.layers:
        repacked = "AMX" in layer.kernel or "REPACK" in layer.kernel
        others += layer.stored_bytes if layer.role == "buffer" or (repacked and layer.role != "embedding") else 0
        head += sum(size for part, size in layer.parts.items() if "copy" in part)
    assert abs(head + others - sizes) < 2**14
    assert loaded.kernel != "ggml CPU"
    assert any("beside the file" in note for note in loaded.notes)


def _buffers(loaded):
    from polyquant_llama_cpp._layers import BUFFER

    return BUFFER.findall(loaded.model.load_log.text())


def test_bytes_of_the_key_value_cache(tiny):
    for kind, size in (("F32", 4), ("F16", 2)):
        loaded = load(tiny("llama", "Q8_0"), kv_cache_type=kind)
        assert loaded.kv_cache_bytes_per_token([1]) == 2 * 2 * 2 * 64 * size  # layers, k and v, heads, head size
        report = polyquant.verify(loaded, max_new_tokens=2)
        assert report.memory.kv_cache_bytes_per_token == loaded.kv_cache_bytes_per_token([1])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"compute_dtype": "bfloat16"}, ConfigError, "compute_dtype 'bfloat16' is not llama.cpp's to choose"),
        ({"kv_cache_type": "Q8_0", "flash_attention": "off"}, ConfigError, "needs flash attention"),
        ({"n_ctx": 513}, ConfigError, "n_ctx 513 is more than the 512 tokens"),
        ({"n_ctx": -1}, ConfigError, "n_ctx"),
        ({"attention": "eager"}, ConfigError, "attention 'eager' is transformers'"),
        ({"device_map": {"": "cpu", "blk.0": 0}}, ConfigError, "devices that are not here: blk.0 -> 0"),
        ({"device_map": {"": "cpu", "blk.0": "disk"}}, PlacementError, "disk"),
        ({"skip": ("blk.0",)}, CheckpointConflict, "skip: requested"),
        ({"skip_defaults": False}, CheckpointConflict, "skip_defaults: requested"),
        ({"type": "Q4_K_M"}, CheckpointConflict, "type: requested 'Q4_K_M', stored 'Q8_0'"),
        ({"max_memory": {"cpu": "1GiB"}}, ConfigError, "does not plan its memory"),
    ],
)
def test_options_that_make_no_sense_are_refused(tiny, options, error, words):
    with pytest.raises(error, match=words):
        load(tiny("llama", "Q8_0"), **options)


def test_options_are_settled(tiny, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    config = load(tiny("llama", "Q8_0"), kv_cache_type="Q8_0", n_batch=64).config
    assert (config.type, config.n_ctx, config.n_threads, config.n_batch) == ("Q8_0", 512, 3, 64)
    assert config.repack in ("on", "off")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= load(tiny("llama", "Q8_0"), n_ctx=100).config.n_threads


def test_dense_models_need_a_gguf_and_dense_ggufs_a_word(tiny):
    path = tiny("llama", "F16")
    with pytest.raises(CheckpointConflict, match="--backend gguf --out DIR"):
        load(path.parent / "llama")
    with pytest.raises(DenseModelError, match="allow_dequantize=True"):
        load(path)
    assert load(path, allow_dequantize=True).config.type == "F16"


@pytest.mark.real
def test_the_builtin_model_is_its_gguf():
    loaded = load("builtin:smollm2", n_ctx=256)
    assert loaded.request.source.gguf_file.endswith(".gguf")
    assert loaded.config.type == "Q4_1"
    assert "Paris" in loaded.generate("The capital of France is", max_new_tokens=8)
    assert polyquant.verify(loaded).passed
