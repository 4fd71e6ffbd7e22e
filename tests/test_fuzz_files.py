"""Fuzz tests of model files: GGUF headers, safetensors headers, config.json and what lies beside it."""

import json
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from polyquant import api
from polyquant.loading import stored
from polyquant.models import versions
from polyquant.errors import ModelError
from polyquant.models import gguf_header, headers
from polyquant.models.gguf_types import TYPES
from polyquant.models.outline import outline
from polyquant.models.resolve import resolve
from polyquant.request import ModelSource
from polyquant.types import WeightInfo

from .fuzzing import SETTINGS, TEXTS, VALUES, damaged, guarded, json_files, mutated

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16, "head_dim": 4,
    "max_position_embeddings": 32, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "float16",
    "tie_word_embeddings": False, "text_config": {}, "quantization_config": None,
}  # fmt: skip
LLAMA = {key: value for key, value in CONFIG.items() if key != "text_config"}
DIALECTS = [
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "checkpoint_format": "gptq",
     "dynamic": {"-:lm_head": {}, "layers.0": {"bits": 8}}, "modules_in_block_to_quantize": [["q_proj"]], "meta": {"damp": 0.1}},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["lm_head"]},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
     "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["lm_head"]},
    {"load_in_8bit": True, "llm_int8_threshold": 6.0},
    {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}}, "skip_modules": ["lm_head"]},
    {"quant_method": "quanto", "weights": "int8", "activations": None, "modules_to_not_convert": None},
    {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": 32}}}},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"], "quantization_status": "compressed",
     "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True,
     "strategy": "group", "group_size": 128}, "input_activations": None}}},
    {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "packing_format": "auto_round:auto_gptq",
     "extra_config": {"lm_head": {"bits": 16}}},
    {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 1, "nbits_per_codebook": 16,
     "linear_weights_not_to_quantize": ["lm_head"]},
    {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"},
    {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}},
     "exclude": ["lm_head"], "layer_quant_config": {}, "export": {"pack_method": "reorder"}},
    {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline", "modules_to_not_convert": ["lm_head"]},
    {"quant_method": "mlx", "group_size": 64, "bits": 4, "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 8}, "lm_head": False},
    {"quant_method": "metal", "bits": 4, "group_size": 64, "modules_to_not_convert": ["lm_head"]},
    {"quant_method": "sinq", "nbits": 4, "group_size": 64, "tiling_mode": "1D"},
]  # fmt: skip


# GGUF


def gguf_string(text):
    return struct.pack("<Q", len(text)) + text


@st.composite
def gguf_parts(draw):
    """(metadata, tensors) of a file that is well formed."""
    metadata = {b"general.architecture": (8, gguf_string(b"llama"))}
    for key in draw(
        st.lists(
            st.sampled_from([b"llama.block_count", b"general.alignment", b"tokens", b"split.count", b"x"]), unique=True
        )
    ):
        kind = draw(st.sampled_from([4, 6, 8, 9, 10, 12]))
        metadata[key] = (kind, draw(gguf_value(kind)))
    tensors = []
    for name in draw(st.lists(st.sampled_from([b"token_embd.weight", b"a", b"b"]), max_size=3, unique=True)):
        block = draw(st.sampled_from(list(TYPES.values())))
        rows, columns = draw(st.integers(1, 3)), block.elements * draw(st.integers(1, 2))
        tensors.append((name, (rows, columns), block, rows * columns // block.elements * block.nbytes))
    return metadata, tensors


def gguf_value(kind):
    if kind == 8:
        return st.binary(max_size=9).map(gguf_string)
    if kind == 9:
        numbers = st.lists(st.integers(0, 9), max_size=5).map(
            lambda each: struct.pack(f"<IQ{len(each)}I", 4, len(each), *each)
        )
        strings = st.lists(st.binary(max_size=5), max_size=4).map(
            lambda each: struct.pack("<IQ", 8, len(each)) + b"".join(map(gguf_string, each))
        )
        return st.one_of(numbers, strings)
    code = {4: "<I", 6: "<f", 10: "<Q", 12: "<d"}[kind]
    return st.integers(0, 64).map(lambda value: struct.pack(code, value))


def gguf_bytes(parts):
    metadata, tensors = parts
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        content += gguf_string(key) + struct.pack("<I", kind) + value
    offset, data = 0, b""
    for name, (rows, columns), block, nbytes in tensors:
        content += gguf_string(name) + struct.pack("<IQQIQ", 2, columns, rows, block.id, offset)
        padded = -(-nbytes // 32) * 32
        data, offset = data + b"\1" * padded, offset + padded
    return content + b"\0" * (-len(content) % 32) + data


def read_gguf(path, content):
    path.write_bytes(content)
    gguf_header._whole.cache_clear()  # it goes by size and time, and both may be the same
    with guarded(path.parent, len(content)):
        header = gguf_header.read_header(path)
        spans = sorted((entry.start, entry.start + entry.nbytes) for entry in header.tensors.values())
        assert all(0 < start <= end <= len(content) for start, end in spans)
        assert all(one[1] <= other[0] for one, other in zip(spans, spans[1:], strict=False))
        for key in header.string_arrays:
            texts = list(gguf_header.read_strings(header, key))
            assert len(texts) == len(header.metadata[key])
            assert sum(map(len, texts)) <= len(content)
        header.number("block_count")
        return header
    return None


@settings(**SETTINGS)
@given(parts=gguf_parts())
def test_gguf_headers_that_are_well_formed(tmp_path, parts):
    header = read_gguf(tmp_path / "a.gguf", gguf_bytes(parts))
    metadata, tensors = parts
    if header is not None:
        assert {name.decode(): (shape, nbytes) for name, shape, _, nbytes in tensors} == {
            entry.name: (entry.shape, entry.nbytes) for entry in header.tensors.values()
        }
    else:  # a chance value of a key that the format gives a meaning
        assert metadata.keys() & {b"general.alignment", b"split.count"} or any(
            kind in (8, 9) for kind, _ in metadata.values()
        )


@settings(**SETTINGS)
@given(
    content=st.one_of(
        damaged(gguf_parts().map(gguf_bytes)), st.binary(max_size=60).map(lambda rest: b"GGUF\3\0\0\0" + rest)
    )
)
@example(content=b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63))
@example(
    content=b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + gguf_string(b"general.architecture")
    + struct.pack("<IIQ", 9, 9, 2**60)
)
def test_gguf_headers_that_are_damaged(tmp_path, content):
    read_gguf(tmp_path / "a.gguf", content)


# safetensors


@st.composite
def safetensors_files(draw):
    """A file whose header is well formed or nearly so: true and untrue shapes, dtypes and offsets."""
    header, data = {}, b""
    for name in draw(st.lists(TEXTS, max_size=3, unique=True)):
        count = draw(st.integers(0, 4))
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [len(data), len(data) + 4 * count]}
        data += b"\0" * 4 * count
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    header = draw(mutated(header)) if header and draw(st.booleans()) else header
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(CONFIG))
    return out


@settings(**SETTINGS)
@given(content=st.one_of(safetensors_files(), damaged(safetensors_files()), st.binary(max_size=60)))
@example(content=struct.pack("<Q", 2**64 - 1) + b"{}")
@example(content=struct.pack("<Q", 60_000) + b"[" * 60_000)
@example(content=struct.pack("<Q", 12) + b'{"a": "\xff"} ')
@example(content=struct.pack("<Q", 4) + b"null")
def test_safetensors_headers(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    accepted = []
    with guarded(folder, len(content)):
        accepted.append(resolve(folder))
    with guarded(folder, len(content)):
        tensors = headers.read_safetensors(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)
        accepted.append(tensors)
    if len(accepted) == 2:
        assert len(accepted[1]) > 0


# config.json, the index, sidecars


def describe(folder, size):
    """Every question that is asked of a checkpoint's JSON before its weights are read."""
    with guarded(folder, size):
        source = resolve(folder)
        assert all((folder / name).resolve().parent == folder.resolve() for name in source.weight_files)
        assert all(name.endswith(".safetensors") for name in source.weight_files)
        method = stored.method_of(source)
        if method:
            stored.reader_of(method, SELECTION)
    with guarded(folder, size):
        outline(folder)


SELECTION = api.backends()


@settings(**SETTINGS)
@given(content=json_files(CONFIG))
@example(content=b'{"text_config": [1]}')
@example(content=b'{"quantization_config": "4 bit"}')
@example(content=b'{"quantization_config": [[1, 2]]}')
@example(content=b'{"model_type": "llama", "text_config": {"quantization_config": 4}}')
@example(content=b'{"a": "\xff"}')
@example(content=b'{"model_type": "llama", "dtype": []}')
def test_configs(folder, content):
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", 54) + b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}} ' + b"\0"
    )
    (folder / "config.json").write_bytes(content)
    describe(folder, len(content))


@settings(**SETTINGS)
@given(
    content=json_files(
        {"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors", "b": "training_args.bin"}}
    )
)
@example(content=b'{"weight_map": {"a": "model-1.safetensors", "b": "training_args.bin"}}')
@example(content=b'{"weight_map": {"a": "\\u0000"}}')
def test_indexes(folder, content):
    (folder / "model-1.safetensors").write_bytes(
        struct.pack("<Q", 54) + b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}} ' + b"\0"
    )
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "model.safetensors.index.json").write_bytes(content)
    describe(folder, len(content))


@settings(**SETTINGS)
@given(
    content=json_files({"bits": 4, "group_size": 128}),
    name=st.sampled_from(["quantize_config.json", "quant_config.json"]),
)
def test_sidecars(folder, content, name):
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", 54) + b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}} ' + b"\0"
    )
    for other in ("quantize_config.json", "quant_config.json"):
        (folder / other).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    describe(folder, len(content))


# quantization_config, as each installed backend reads it


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.get("quant_method", "load_in_8bit"))
def test_quantization_configs(folder, dialect):
    readers = [info for info in SELECTION if set(info.capabilities.loads_prequantized) - {"gguf"}]

    @settings(**SETTINGS)
    @given(config=mutated(dialect), other=VALUES)
    def run(config, other):
        for given_config in (config, {**dialect, "group_size": other, "bits": other}):
            whole = CONFIG | {"quantization_config": given_config}
            source = ModelSource(name="x", path=folder, config=whole)
            with guarded(folder, len(json.dumps(whole))):
                method = stored.method_of(source)
                for info in readers if method else ():
                    if method in info.capabilities.loads_prequantized:
                        options = stored.stored_options(source, info, method)
                        assert isinstance(options, info.options)
                        stored.reconcile(source, options, options, {"skip": options.skip}, info)

    warm = ModelSource(name="x", path=folder, config=CONFIG | {"quantization_config": dialect})
    for info in readers:  # libraries that reading imports are no part of what it allocates
        try:
            stored.stored_options(warm, info, stored.method_of(warm))
        except Exception:
            pass
    run()


# through transformers


@settings(**SETTINGS, max_examples=settings.default.max_examples // 5)
@given(config=mutated(LLAMA))
@example(config=LLAMA | {"model_type": ["llama"], "auto_map": {}})
@example(config=LLAMA | {"num_hidden_layers": 2**31})
@example(config=LLAMA | {"hidden_size": 2**62, "vocab_size": 2**62})
@example(config=LLAMA | {"hidden_size": "8"})
@example(config=LLAMA)
def test_skeletons(folder, config):
    from polyquant.models import hf
    from polyquant.models.weights import list_weights

    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", 54) + b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}} ' + b"\0"
    )
    (folder / "config.json").write_text(json.dumps(config))
    with guarded(folder, 2**20):
        weights = list_weights(hf.skeleton(resolve(folder), "float32"))
        assert all(isinstance(weight, WeightInfo) for weight in weights)
        assert config != LLAMA or len(weights) == (14 if versions.VERSION_5 else 13)  # 5 has a second rotary buffer
        return
    assert config != LLAMA


def test_the_guard_bites(folder, tmp_path):
    (tmp_path / "outside").write_text("secret")
    with pytest.raises(AssertionError, match="read outside"), guarded(folder, 0):
        (tmp_path / "outside").read_text()
    with pytest.raises(AssertionError, match="were allocated for a file of 0"), guarded(folder, 0):
        bytearray(2**21)
    with pytest.raises(KeyError), guarded(folder, 0):
        raise KeyError
    with guarded(folder, 0):
        raise ModelError("one of ours")
