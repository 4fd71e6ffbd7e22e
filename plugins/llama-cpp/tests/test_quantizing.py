"""Files of every type, made by llama.cpp."""

import polyquant
import pytest
from polyquant.errors import ConfigError, ModelError
from polyquant_llama_cpp import formats
from transformers import AutoTokenizer

from .conftest import load


@pytest.mark.parametrize("type", formats.QUANTIZABLE)
def test_every_type_is_made_and_runs(tiny, tmp_path, type):
    out = polyquant.quantize(tiny("llama", "F32"), "llama-cpp", tmp_path / "out", type=type)
    loaded = load(out)
    assert loaded.config.type == type
    family = type.removesuffix("_S").removesuffix("_M").removesuffix("_L")
    schemes = [layer.scheme for layer in loaded.layers if layer.quantized and layer.role == "linear"]
    if type not in ("IQ3_XS", "IQ3_M"):  # mixes of neighbouring types by name
        assert any(scheme.startswith(family) for scheme in schemes), schemes
    bits = polyquant.backend("llama-cpp").config({"type": type}).weight_bits
    named = int(next(letter for letter in type if letter.isdigit()))
    assert bits == (1.6 if type == "TQ1_0" else named)  # three values to a weight: rounded to 1 in its name alone


def test_quantizing_draws_progress_only_where_asked(tiny, tmp_path, capfd):
    polyquant.quantize(tiny("llama", "F32"), "llama-cpp", tmp_path / "one", type="Q4_0")
    assert capfd.readouterr() == ("", "")
    polyquant.quantize(tiny("llama", "F32"), "llama-cpp", tmp_path / "two", type="Q4_0", progress=True)
    assert "21/21" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "type 'file' cannot be made here; choose one of Q4_0"),
        ({"type": "F16"}, "type 'F16' cannot be made here"),
        ({"type": "IQ2_XXS"}, "type 'IQ2_XXS' cannot be made here"),
        ({"type": "Q4_0", "skip": ("blk.0",)}, "leave skip and skip_defaults out"),
        ({"type": "Q4_0", "skip_defaults": False}, "leave skip and skip_defaults out"),
        ({"type": "Q4_0", "n_ctx": 64, "mmap": False}, "mmap, n_ctx only matter when the file is loaded"),
        ({"type": "Q4_0", "calibration": ["Some text."]}, "quantizes to these types without text"),
        ({"type": "Q3_K_S"}, "quantized already .*is Q4_0.* requantize=True"),
    ],
)
def test_quantizing_refuses(tiny, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        polyquant.quantize(tiny("llama", "Q4_0"), "llama-cpp", tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_quantizing_takes_a_gguf_only(tiny, tmp_path):
    with pytest.raises(ModelError, match="polyquant quantize .*llama --backend gguf --type Q8_0 --out DIR"):
        polyquant.quantize(tiny().parent / "llama", "llama-cpp", tmp_path / "out", type="Q4_0")
    assert load(
        polyquant.quantize(tiny("llama", "Q4_0"), "llama-cpp", tmp_path / "again", type="Q3_K_S", requantize=True)
    )


def test_rows_that_are_not_whole_blocks_are_refused_by_name(tiny, write, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=384, hidden_size=96, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, head_dim=48,
        num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    AutoTokenizer.from_pretrained(tiny().parent / "llama").save_pretrained(tmp_path / "narrow")
    path = write(tmp_path / "narrow", tmp_path / "narrow.gguf")
    words = r"blk\.0\.attn_k\.weight has rows of 96 weights, and q4_K blocks hold 256; llama.cpp would take q5_0 .*fallback=True"
    with pytest.raises(ConfigError, match=words):
        polyquant.quantize(path, "llama-cpp", tmp_path / "out", type="Q4_K_S")
    loaded = load(polyquant.quantize(path, "llama-cpp", tmp_path / "out", type="Q4_K_S", fallback=True))
    schemes = {layer.name: layer.scheme for layer in loaded.layers}
    assert (schemes["blk.0.attn_k.weight"], schemes["blk.0.ffn_down.weight"]) == ("Q5_0", "Q4_K")
    assert any("calls itself Q4_K_S; its matrices are" in note and "Q5_0" in note for note in loaded.notes)
    with pytest.raises(ConfigError, match="rows of 90 weights.*no type fits this model"):
        polyquant.quantize(tiny("odd", "F32"), "llama-cpp", tmp_path / "odd", type="Q4_0", fallback=True)
