"""`polyquant convert` from a user's side: what is written, said and refused, whatever the formats."""

import json
import os
import signal
import subprocess
import sys
import time

import polyquant
import pytest
import torch
from polyquant.cli.main import main
from polyquant.errors import ConversionRefused, Misfit, SaveError, UnsupportedOperation
from polyquant.packed_weights.codes import WeightCodes, codes_of, fits
from polyquant.packed_weights.weight import pack_weight
from polyquant.plugin import E2M1, unpacked
from polyquant.plugin.packing import e4m3_scales, exponents, in_awq_words, in_words, unpacked_awq
from polyquant.plugin.packing import unpacked as out_of_words
from polyquant.testing import warm
from polyquant.testing.models import tiny_model
from safetensors.torch import load_file

for needed in ("bitsandbytes", "gguf", "gptqmodel", "compressed_tensors", "hqq", "optimum.quanto"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def checkpoint(models):
    """A checkpoint of a tiny model, as `polyquant quantize` writes it; made once."""

    def make(backend, model="llama", **options):
        out = models / "-".join(
            [model, backend.replace(":", "-"), *(f"{key}={value}" for key, value in options.items())]
        )
        if not out.exists():
            polyquant.quantize(tiny_model(model, models), backend, out, device="cpu", **options)
        return out

    return make


def test_the_command(checkpoint, tmp_path, monkeypatch, capsys):
    """A table for people, a record for scripts; an output that is there is left alone."""
    source, out = checkpoint("gguf:Q4_0"), tmp_path / "out"

    def run(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["polyquant", "convert", str(source), "--to", "awq", "--out", str(out), *arguments]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    code, said, _ = run()
    assert code == 0 and "14 of 14 layers are bit-equal" in said and f"wrote {out}" in said
    code, _, error = run()
    assert code == 1 and "exists" in error and "--overwrite" in error
    code, said, _ = run("--overwrite", "--json")
    record = json.loads(said)
    assert code == 0 and record["options"] == {"bits": 4, "group_size": 32, "zero_point": False}
    assert len(record["layers"]) == 14 and {layer["largest_difference"] for layer in record["layers"]} == {0.0}
    assert (out / "tokenizer.json").exists() and (out / "generation_config.json").exists()


def test_a_chain_of_eight_bits(checkpoint, tmp_path):
    """compressed-tensors, quanto, LLM.int8, hqq, Q8_0, GPTQ and back, each bit-equal to the one before."""
    source = first = checkpoint("compressed-tensors:int8")
    for number, target in enumerate(["quanto", "bitsandbytes", "hqq", "gguf", "gptq", "compressed-tensors"]):
        conversion = polyquant.convert(source, target, tmp_path / str(number))
        assert conversion.exact, target
        source = tmp_path / str(number)
    before, after = (polyquant.load(path, device="cpu", kernel="packed").model for path in (first, source))
    name = "model.layers.0.mlp.gate_proj"
    assert torch.equal(before.get_submodule(name).dequantize(), after.get_submodule(name).dequantize())


def test_minima_that_are_no_multiples(checkpoint, tmp_path):
    """hqq's zero points are fractions: zero points of GPTQ are not, minima of Q4_1 are."""
    source = checkpoint("hqq:int4")
    with pytest.raises(ConversionRefused, match="minima of 14 layers .* convert to .*gguf"):
        polyquant.convert(source, "gptq", tmp_path / "out")
    conversion = polyquant.convert(source, "gguf", tmp_path / "gguf")
    assert 0 < conversion.largest_relative_difference < 2e-3 and conversion.options["type"] == "Q4_1"


def test_code_books(checkpoint, tmp_path):
    """NF4 stays NF4, its block scales no longer quantized; nothing else holds it. MXFP4 is held by two formats."""
    nested = checkpoint("bitsandbytes:nf4", double_quant=True)
    assert polyquant.convert(nested, "bitsandbytes:double_quant=false", tmp_path / "plain").exact
    with pytest.raises(ConversionRefused, match="bits of 14 layers.*code book of 4 bits"):
        polyquant.convert(tmp_path / "plain", "gguf", tmp_path / "out")
    mx = checkpoint("compressed-tensors", weights="mxfp4")
    conversion = polyquant.convert(mx, "gguf", tmp_path / "gguf")
    assert conversion.exact and conversion.options["type"] == "MXFP4"
    assert polyquant.convert(tmp_path / "gguf", "compressed-tensors", tmp_path / "back").exact
    ours, theirs = (load_file(path / "model.safetensors") for path in (mx, tmp_path / "back"))
    for part in ("weight_packed", "weight_scale"):
        name = f"model.layers.0.mlp.up_proj.{part}"
        assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize("weights", ["mxfp4", "nvfp4"])
def test_floats_of_four_bits(checkpoint, tmp_path, weights):
    """The very codes go to fouroversix, in its padded and swizzled order, and come back.

    NVFP4's scales are divided by a factor here and multiplied there: the last bit of a float32 may differ.
    """
    pytest.importorskip("fouroversix")
    source = checkpoint("compressed-tensors", weights=weights)
    first = polyquant.convert(source, "fouroversix", tmp_path / "there")
    assert first.options["dtype"] == weights and first.largest_relative_difference <= 2**-22
    again = polyquant.convert(tmp_path / "there", "compressed-tensors", tmp_path / "back")
    assert again.largest_relative_difference <= 2**-22 and (weights == "nvfp4" or (first.exact and again.exact))
    ours, theirs = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    name = "model.layers.0.self_attn.k_proj.weight_packed"
    assert torch.equal(ours[name], theirs[name])


def test_layers_of_several_formats(checkpoint, tmp_path):
    """A GGUF of Q4_0 and Q8_0 has a place where formats are mixed, and none where all layers are alike."""
    source = checkpoint("gguf", type="Q4_0", layers="down_proj=Q8_0")
    conversion = polyquant.convert(source, "compressed-tensors", tmp_path / "out")
    assert conversion.exact and {name.rpartition(".")[2] for name, _ in conversion.options["layers"]} == {"down_proj"}
    assert polyquant.convert(tmp_path / "out", "gguf", tmp_path / "again").exact
    with pytest.raises(ConversionRefused, match="bits of 1 layers .layers together."):
        polyquant.convert(source, "gptq", tmp_path / "refused")


def test_tied_heads_biases_and_embeddings(checkpoint, tmp_path):
    """A quantized embedding, with a head that is tied to it, is written dense: the same numbers, and a note."""
    source = checkpoint("gguf", model="llama-tied", type="Q4_0", embedding_type="Q8_0")
    conversion = polyquant.convert(source, "gptq", tmp_path / "tied")
    assert conversion.exact and "embed_tokens is quantized in the source (Q8_0)" in conversion.notes[0]
    before, after = (polyquant.load(path, device="cpu", kernel="packed") for path in (source, tmp_path / "tied"))
    torch.testing.assert_close(before.logits([3, 4, 5]), after.logits([3, 4, 5]), rtol=1e-2, atol=1e-2)
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    biased = polyquant.convert(checkpoint("gguf:Q4_0", model="qwen2"), "compressed-tensors", tmp_path / "biased")
    assert biased.exact and "model.layers.0.self_attn.q_proj.bias" in load_file(
        tmp_path / "biased" / "model.safetensors"
    )


def test_shards(checkpoint, tmp_path, monkeypatch):
    """A checkpoint larger than a file may be is several, which are read back whole."""
    monkeypatch.setattr(unpacked, "SHARD_BYTES", 2**18)
    assert polyquant.convert(checkpoint("gguf:Q4_0"), "gptq", tmp_path / "out").exact
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"


def test_requantizing_is_asked_for_and_gated(checkpoint, tmp_path):
    """Further than allowed: nothing is written. Within: the record says that it was rounded again, and how far it is."""
    source = checkpoint("bitsandbytes:nf4")
    with pytest.raises(ConversionRefused, match="0.001 is allowed. Nothing was written"):
        polyquant.convert(source, "gguf:type=Q4_0", tmp_path / "out", requantize=True, max_kl=0.001)
    assert not (tmp_path / "out").exists()
    conversion = polyquant.convert(source, "gguf:type=Q8_0", tmp_path / "out", requantize=True)
    assert conversion.requantized and not conversion.exact and 0 < conversion.kl_mean <= 0.05
    assert "bits of 14 layers" in conversion.notes[0]
    assert polyquant.verify(polyquant.load(tmp_path / "out" / "model.gguf", device="cpu")).passed


def test_refused_before_work(checkpoint, tmp_path):
    source = checkpoint("gguf:Q4_0")
    with pytest.raises(UnsupportedOperation, match="nothing is converted to aqlm.*gptq"):
        polyquant.convert(source, "aqlm", tmp_path / "out")
    with pytest.raises(UnsupportedOperation, match="environment of its own.*gptq"):
        polyquant.convert(source, "autogptq", tmp_path / "out")
    with pytest.raises(ConversionRefused, match="is gguf's already"):
        polyquant.convert(source, "gguf", tmp_path / "out")
    with pytest.raises(polyquant.errors.ConfigError, match="is dense"):
        polyquant.convert(tiny_model("llama", tmp_path), "gptq", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(SaveError, match="exists"):
        polyquant.convert(source, "gptq", tmp_path / "out")


def test_a_kill_leaves_nothing(checkpoint, tmp_path):
    """While layers are written: what is at the output is nothing, and the next run is whole."""
    source, out = checkpoint("gguf:Q4_0"), tmp_path / "out"
    code = (
        "import sys, time, polyquant\nfrom polyquant.plugin import unpacked\nwrite = unpacked._write_shards\n"
        "def slow(tensors, *rest):\n    def each():\n        for pair in tensors:\n            yield pair\n"
        "            print('writing', flush=True); time.sleep(0.2)\n    write(each(), *rest)\n"
        "unpacked._write_shards = slow\npolyquant.convert(sys.argv[1], 'gptq', sys.argv[2])\n"
    )
    process = subprocess.Popen(
        [warm.interpreter(), "-c", code, str(source), str(out)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGKILL)
    assert not out.exists()
    assert polyquant.convert(source, "gptq", out).exact
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def random_codes(rows=16, columns=64, most=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, most, (rows, columns), generator=generator, dtype=torch.uint8)


def test_codes_come_back_as_they_were_packed():
    """Codes, scales, zero points and act-order of a weight whose rows and columns are padded in the packed layout."""
    codes, groups = random_codes(13, 64), torch.arange(64).flip(0) // 16
    scales, zeros = torch.rand(13, 4).half() + 0.1, random_codes(13, 4).short()
    found = codes_of("layer", pack_weight(codes, scales, 16, zeros=zeros, groups_of_columns=groups))
    assert torch.equal(found.codes, codes) and torch.equal(found.scales, scales)
    assert torch.equal(found.zeros, zeros) and torch.equal(found.groups.long(), groups)
    assert found.held.ordered and found.held.zero_points == "whole" and found.held.group_size == 16
    in_turn = codes_of("layer", pack_weight(codes, scales, 16, zeros=zeros, groups_of_columns=groups.flip(0)))
    assert in_turn.groups is None  # said to be ordered, and in turn


def test_minima_become_zero_points_where_they_are_some():
    """Of a float16 minimum, the zero point that it was rounded from; of one that is none, nothing."""
    scales = torch.rand(16, 2).half() + 0.1
    zeros = random_codes(16, 2).float()
    minima = (-zeros * scales.float()).half().float()
    found = codes_of("layer", pack_weight(random_codes(), scales, 32, minima=minima))
    assert torch.equal(found.zeros.float(), zeros) and found.minima is None
    other = codes_of("layer", pack_weight(random_codes(), scales, 32, minima=minima + 0.3 * scales.float()))
    assert other.zeros is None and other.held.zero_points == "none"
    with pytest.raises(Misfit, match="minima"):
        other.zero_points()


def test_scales_have_a_place_in_a_dtype():
    """Rounded where that is all; refused where numbers are lost."""
    scales = torch.tensor([[0.1, 0.2], [0.3, 1e-9]])
    weight = WeightCodes(name="layer", shape=(2, 64), codes=random_codes(2), scales=scales, group_size=32)
    assert weight.scales_as(torch.float16).dtype == torch.float16
    assert weight.scales_as(torch.float16, torch.float32).dtype == torch.float32
    large = WeightCodes(name="layer", shape=(2, 64), codes=random_codes(2), scales=scales * 1e6, group_size=32)
    with pytest.raises(Misfit, match="scale dtype: its scales, to 3e.05, have no place in float16"):
        large.scales_as(torch.float16)
    assert not fits(scales * 1e-7, (scales * 1e-7).half())


def test_words_and_small_floats():
    """Words are read back as they were written; powers of two and E4M3 scales are found, and others refused."""
    codes = random_codes(8, 64)
    assert torch.equal(out_of_words(in_words(codes, 4), 4), codes) and torch.equal(
        unpacked_awq(in_awq_words(codes)), codes
    )
    powers = 2.0 ** torch.arange(-20, 12).reshape(4, 8)
    assert torch.equal(2.0 ** (exponents(powers).float() - 127), powers)
    with pytest.raises(Misfit, match="no powers of two"):
        exponents(powers * 1.5)
    small = torch.arange(1, 120, dtype=torch.uint8).view(torch.float8_e4m3fn).float()[None]
    for factor in (torch.tensor(0.00317), torch.tensor(7.3)):
        for divides in (True, False):
            wide = small / factor if divides else small * factor
            held, by = e4m3_scales(wide, divides=divides)
            assert torch.equal(held.float() / by if divides else held.float() * by, wide)
    with pytest.raises(Misfit, match="E4M3"):
        e4m3_scales(torch.rand(4, 8), divides=True)
    assert len(E2M1) == 16
