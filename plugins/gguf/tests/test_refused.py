"""Files that are not read: cut, damaged, lying, overlapping, or of what transformers would load wrong."""

import polyquant
import pytest
import torch
from polyquant.errors import ModelError
from polyquant.testing.models import tiny_model
from polyquant_gguf import _metadata
from polyquant.plugin.gguf import read_header
from .conftest import row, tiny, write_gguf


# bad files: a ModelError each, before memory is taken


def test_every_cut_of_a_file_is_refused(llama):
    _, path = llama
    whole = path.read_bytes()
    header = min(entry.start for entry in read_header(path).tensors.values())
    for end in [*range(4, header, 97), header, len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(ModelError):
            read_header(path)


def test_random_damage_to_the_header_never_escapes(llama):
    import random

    _, path = llama
    whole, header = path.read_bytes(), min(entry.start for entry in read_header(path).tensors.values())
    chance, refused = random.Random(5), 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[chance.randrange(header)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            read_header(path)
        except ModelError as error:
            assert str(path) in str(error) or path.name in str(error)
            refused += 1
    assert 0 < refused < 400, "some damage is seen, some changes a name or a number"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (2**62, 64)}, "should have .* bytes"),
        ({"shape": (2**63, 2**63)}, "should have .* bytes|the shape"),
        ({"shape": (96, 63)}, "blocks hold 32 weights"),
        ({"shape": (0, 64)}, "has the shape"),
        ({"shape": (96, 32)}, "has the shape .* its metadata say"),
        ({"kind": 31}, "has ggml type 31; types that can be read: F32"),
        ({"offset": 2**63}, "should have .* bytes at"),
        ({"offset": 7}, "should have .* bytes at"),
    ],
)
def test_a_lying_tensor_table(llama, change, message):
    _, path = llama
    entry = read_header(path).tensors["output.weight"]
    begin = min(other.start for other in read_header(path).tensors.values())
    true = {"shape": entry.shape, "kind": entry.type.id, "offset": entry.start - begin}
    content, old = path.read_bytes(), row("output.weight", **true)
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, row("output.weight", **{**true, **change})))
    with pytest.raises(ModelError, match=message):
        polyquant.load(path, "gguf")


def test_overlapping_tensors(llama):
    _, path = llama
    header = read_header(path)
    begin = min(other.start for other in header.tensors.values())
    one, two = header.tensors["blk.0.attn_q.weight"], header.tensors["blk.1.attn_q.weight"]
    old = row(two.name, two.shape, two.type.id, two.start - begin)
    path.write_bytes(path.read_bytes().replace(old, row(two.name, two.shape, two.type.id, one.start - begin)))
    with pytest.raises(ModelError, match="overlap"):
        read_header(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF\x03\x00\x00\x00", b"GGUF\x01\x00\x00\x00", "its version is 1"),
        (b"GGUF\x03\x00\x00\x00", b"GGUF\x00\x00\x00\x03", "a big-endian file"),
        (b"GGUF\x03\x00\x00\x00", b"GGUF\x03\x00\x00\x00" + b"\xff" * 7 + b"\x7f", "it claims .* tensors"),
        (b"general.architecture", b"general.architecturE", "no general.architecture"),
        (b"\x0d" + b"\0" * 7 + b"output.weight", b"\x0d" + b"\0" * 7 + b"outpuT.weight", "lacks 1 tensors of the model: lm_head.weight|has no place"),
        (b"llama.block_count\x04\x00\x00\x00\x02", b"llama.block_count\x04\x00\x00\x00\x01", "has no place for"),
        (b"llama.block_count\x04\x00\x00\x00\x02", b"llama.block_count\x04\x00\x00\xff\xff", "block_count"),
        (b"llama.attention.head_count_kv\x04\x00\x00\x00\x02", b"llama.attention.head_count_kv\x04\x00\x00\x00\x03", "."),
        (b"llama.embedding_length\x04\x00\x00\x00\x40", b"llama.embedding_length\x04\x00\x00\x00\x00", "."),
    ],
)  # fmt: skip
def test_bad_headers(patched, old, new, message):
    with pytest.raises(ModelError, match=message):
        polyquant.load(patched(old, new), "gguf")


def test_architectures_that_would_load_wrong_are_refused(tmp_path):
    from gguf import GGUFWriter

    for extra, message in (
        ({}, "the architecture 'falcon'; this backend reads llama"),
        ({"expert_count": 8}, "llama.context_length is missing"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type = yarn, and of llama files linear is read"),
        ({"rope.scaling.type": "linear"}, "llama.rope.scaling has the factor None"),
    ):
        writer = GGUFWriter(tmp_path / "x.gguf", "llama" if extra else "falcon")
        for key, value in extra.items():
            _metadata.add(writer, f"llama.{key}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ModelError, match=message):
            polyquant.load(tmp_path / "x.gguf", "gguf")


def test_a_rotary_width_that_transformers_does_not_read_is_refused(tmp_path):
    dense = tiny("stablelm", tie_word_embeddings=False)
    path = write_gguf(tmp_path / "x.gguf", dense, "stablelm", "Q8_0", {"stablelm.rope.dimension_count": 8})
    with pytest.raises(ModelError, match="rotates 8 dimensions of each head"):
        polyquant.load(path, "gguf")


def test_tensors_without_a_place_are_refused(llama, tmp_path):
    dense, _ = llama
    path = write_gguf(tmp_path / "more.gguf", dense, "llama", blk__0__extra__weight=torch.ones(64))
    with pytest.raises(ModelError, match="no place for: blk.0.extra.weight"):
        polyquant.load(path, "gguf")


def test_options_in_a_file_must_fit_its_types(tmp_path):
    out = polyquant.load(tiny_model("llama", tmp_path), "gguf", type="Q4_0").save(tmp_path / "out")
    path = out / "model.gguf"
    path.write_bytes(path.read_bytes().replace(b'"type":"Q4_0"', b'"type":"Q4_1"', 1))
    with pytest.raises(ModelError, match="contradicts the options stored in the file"):
        polyquant.load(out)
    path.write_bytes(path.read_bytes().replace(b'"type":"Q4_1"', b'"type":"Q9_1"', 1))
    with pytest.raises(ModelError, match="polyquant.options"):
        polyquant.load(out)


@pytest.mark.parametrize(
    ("architecture", "more", "keys", "message"),
    [
        ("gemma2", {"head_dim": 32}, {}, "gemma2.attention.key_length = 32, and transformers, .* takes 256"),
        ("gemma3", {"head_dim": 32}, {}, "gemma3.attention.key_length = 32, and transformers, .* takes 256"),
        ("gemma2", {"head_dim": 256}, {"gemma2.final_logit_softcapping": 12.0}, "final_logit_softcapping = 12.0, .* 30"),
        ("qwen2", {}, {"qwen2.attention.key_length": 32}, "attention.key_length = 32, .* takes 16"),
    ],
)  # fmt: skip
def test_what_transformers_does_not_read_of_a_file_is_not_guessed(tmp_path, architecture, more, keys, message):
    dense = tiny(architecture, tie_word_embeddings=architecture == "gemma2", **more)
    path = write_gguf(tmp_path / "model.gguf", dense, architecture, more=keys)
    for way in (polyquant.load, polyquant.plan):
        with pytest.raises(ModelError, match=message):
            way(path, "gguf", device="cpu")
