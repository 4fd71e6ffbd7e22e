"""Files that would end the process in llama.cpp, where that is not seen before."""

import struct

import gguf
import polyquant
import pytest
from polyquant.errors import ModelError, SaveError
from polyquant.testing.gguf_files import rewritten_gguf

from .conftest import load


def rewritten(path, out, changes=(), types=None, without=()):
    """`path` with metadata changed or added, tensors in another type, or left out."""

    def retyped(tensor):
        if tensor.name in without:
            return None
        kind = gguf.GGMLQuantizationType[(types or {}).get(tensor.name, tensor.tensor_type.name)]
        return tensor.data if kind == tensor.tensor_type else gguf.quants.quantize(tensor.data, kind), kind

    return rewritten_gguf(path, out, dict(changes), retyped)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": "foo"}, "unknown model architecture: 'foo'"),
        ({"llama.block_count": 0}, "block_count is 0"),
        ({"llama.block_count": 600}, "block_count is 600"),
        ({"llama.block_count": 3}, "blk.2.attn_norm.weight"),
        ({"llama.attention.head_count": 3}, "invalid n_rot"),
        ({"llama.feed_forward_length": 511}, "wrong shape"),
        ({"llama.context_length": 0}, "context_length is 0"),
        ({"llama.expert_count": 4}, "expert_count is 4 and expert_used_count 0"),
        ({"llama.expert_used_count": 5}, "expert_count is 0 and expert_used_count 5"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "layer_norm_rms_epsilon is -1"),
        ({"llama.attention.causal": False}, "not a causal language model"),
        ({"tokenizer.ggml.model": "none"}, "holds no tokenizer"),
        ({"tokenizer.ggml.model": "llama"}, "has 0 of the 256 tokens for single bytes"),
        ({"tokenizer.ggml.model": "xx"}, "unknown tokenizer: 'xx'"),
        ({"tokenizer.ggml.tokens": ["a"] * 384}, "1 tokens come twice, such as 'a'"),
        ({"tokenizer.ggml.tokens": None}, "no list of strings"),
        ({"tokenizer.ggml.token_type": [1] * 10}, "token_type holds .*there are 384 tokens"),
    ],
)
def test_metadata_that_lie_are_a_model_error(tiny, tmp_path, changes, words):
    with pytest.raises(ModelError, match=words):
        load(rewritten(tiny("llama", "Q8_0"), tmp_path / "bad.gguf", changes))


def test_tensors_that_lie_are_a_model_error(tiny, tmp_path):
    path = tiny("llama", "Q8_0")
    with pytest.raises(ModelError, match="output_norm.weight is one-dimensional and F16"):
        load(rewritten(path, tmp_path / "norm.gguf", types={"output_norm.weight": "F16"}))
    with pytest.raises(ModelError, match="blk.0.ffn_up.weight"):
        load(rewritten(path, tmp_path / "less.gguf", without=("blk.0.ffn_up.weight",)))
    content = path.read_bytes()
    for end in (0, 3, 20, 200, len(content) // 20, len(content) - 1):
        (tmp_path / "short.gguf").write_bytes(content[:end])
        with pytest.raises(ModelError):
            load(tmp_path / "short.gguf")
    (tmp_path / "magic.gguf").write_bytes(b"GGML" + content[4:])
    with pytest.raises(ModelError, match="not a GGUF"):
        load(tmp_path / "magic.gguf")
    at = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4
    (tmp_path / "offset.gguf").write_bytes(content[:at] + struct.pack("<Q", 2**40) + content[at + 8 :])
    with pytest.raises(ModelError, match="output_norm.weight should have 1024 bytes at"):
        load(tmp_path / "offset.gguf")


def test_a_failed_quantization_leaves_nothing(tiny, tmp_path):
    path = rewritten(tiny("llama", "F32"), tmp_path / "bad.gguf", {"general.architecture": "foo"})
    with pytest.raises(SaveError, match="unknown model architecture"):
        polyquant.quantize(path, "llama-cpp", tmp_path / "out", type="Q4_0")
    assert [each.name for each in tmp_path.iterdir()] == ["bad.gguf"]
