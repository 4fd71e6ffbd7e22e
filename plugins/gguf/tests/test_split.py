"""A model in several files, as llama-gguf-split names them: written, read as one, refused where they are not whole."""

import polyquant
import pytest
import torch
from polyquant.errors import ModelError, SaveError
from polyquant.plugin.gguf import read_header
from polyquant.testing.models import tiny_model

TOKENS = list(range(5, 25))


@pytest.fixture
def split(tmp_path):
    """The folder of a tiny model in parts of at most one MiB, and the same in one file."""
    wrote = [
        polyquant.quantize(tiny_model("llama", tmp_path), "gguf", tmp_path / name, type="Q8_0", device="cpu", **more)
        for name, more in (("parts", {"split_mib": 1}), ("one", {}))
    ]
    return wrote[0], wrote[1]


def test_parts_are_the_model_of_one_file(split, tmp_path):
    parts, one = split
    names = sorted(path.name for path in parts.glob("*.gguf"))
    assert len(names) > 1
    assert names[0] == f"model-00001-of-{len(names):05}.gguf"
    assert all((parts / name).stat().st_size < 1.2 * 2**20 for name in names)
    header, whole = read_header(parts / names[0]), read_header(one / "model.gguf")
    assert set(header.tensors) == set(whole.tensors)
    assert len({entry.path for entry in header.tensors.values()}) == len(names)
    loaded, same = polyquant.load(parts), polyquant.load(one / "model.gguf")
    assert torch.equal(loaded.logits(TOKENS), same.logits(TOKENS))
    assert polyquant.verify(loaded).passed
    assert loaded.config.split_mib == 0  # of who wrote it
    again = loaded.save(tmp_path / "again")
    assert [(again / name).read_bytes() for name in names] == [(parts / name).read_bytes() for name in names]
    with torch.no_grad():
        loaded.model.model.norm.weight.mul_(2)
    changed = polyquant.load(loaded.save(tmp_path / "changed"))
    assert torch.equal(changed.logits(TOKENS), loaded.logits(TOKENS))
    with pytest.raises(SaveError, match="split_mib is for files made of a dense model"):
        polyquant.load(parts, split_mib=1).save(tmp_path / "more")


def test_llama_cpp_runs_the_parts(split):
    pytest.importorskip("llama_cpp")
    parts, one = split
    options = {"kv_cache_type": "F32", "flash_attention": "off"}
    ours, theirs = (polyquant.load(folder, "llama-cpp", **options) for folder in (one, parts))
    assert torch.equal(torch.as_tensor(ours.logits(TOKENS)), torch.as_tensor(theirs.logits(TOKENS)))


def test_parts_that_are_not_whole_are_refused(split, tmp_path):
    folder, _ = split
    first, second, *_ = parts = sorted(folder.glob("*.gguf"))
    with pytest.raises(ModelError, match=f"is one of {len(parts)} parts: give the first, .*{first.name}"):
        polyquant.load(second, "gguf")
    whole = second.read_bytes()
    second.unlink()
    for place in (folder, first):
        with pytest.raises(ModelError, match=f"parts, and 1 of them are not beside it: {second.name}"):
            polyquant.load(place, "gguf")
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match=r"says that it is part 0 of .*, and its name that it is 1 of"):
        polyquant.load(first, "gguf")
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="should have .* bytes"):
        polyquant.load(first, "gguf")
    second.write_bytes(whole)
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match=r"says that it is part 0 of .*, and its name that it is 0 of 1"):
        polyquant.load(alone, "gguf")
    content, key = first.read_bytes(), b"split.tensors.count"
    at = content.index(key) + len(key) + 4  # behind the type
    first.write_bytes(content[:at] + b"\x07" + content[at + 1 :])
    with pytest.raises(ModelError, match="its parts hold .* tensors of 7; fetch them again"):
        polyquant.load(first, "gguf")


def test_another_backend_says_what_to_do_with_parts(split):
    folder, _ = split
    with pytest.raises(ModelError, match="lies in .* parts, and a dense checkpoint is made of one file"):
        polyquant.load(folder, "hqq", device="cpu")
