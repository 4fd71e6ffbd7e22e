"""What this backend writes as llama.cpp reads it."""

import polyquant
import pytest
import torch
import transformers
from polyquant.loading.dense import load_dense
from polyquant.models.resolve import resolve_dense
from polyquant.testing.models import SIZES, tiny_model

pytest.importorskip("llama_cpp")
TOKENS = list(range(5, 37))


def test_linear_rotary_scaling(tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**SIZES, rope_parameters=rope)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).float().save_pretrained(tmp_path / "dense")
    transformers.AutoTokenizer.from_pretrained(tiny_model("llama", tmp_path)).save_pretrained(tmp_path / "dense")
    skip = ("layers", "lm_head")
    loaded = polyquant.load(tmp_path / "dense", "gguf", device="cpu", skip=skip, allow_dequantize=True)
    path = next(loaded.save(tmp_path / "out").glob("*.gguf"))
    theirs = polyquant.load(path, "llama-cpp", kv_cache_type="F32", flash_attention="off", allow_dequantize=True)
    expected, again = loaded.logits(TOKENS), polyquant.load(path, allow_dequantize=True)
    assert torch.equal(again.logits(TOKENS), expected)
    assert (torch.as_tensor(theirs.logits(TOKENS)) - expected).abs().max() < 1e-3 * expected.abs().max()


MORE = {
    "Olmo2": {}, "Cohere": {"logit_scale": 0.5, "tie_word_embeddings": True}, "Gemma": {"tie_word_embeddings": True},
    "SmolLM3": {"num_hidden_layers": 5}, "Ernie4_5": {}, "SeedOss": {}, "Arcee": {},
    "Granite": {
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", MORE)
def test_architectures_whose_configs_transformers_does_not_read(tmp_path, kind):
    """Written dense, llama.cpp computes the same; written in blocks, the file loads back."""
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **MORE[kind]})
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).float().save_pretrained(tmp_path / "dense")
    transformers.AutoTokenizer.from_pretrained(tiny_model("llama", tmp_path)).save_pretrained(tmp_path / "dense")
    options = {"device": "cpu", "kernel": "library"}
    loaded = polyquant.load(tmp_path / "dense", "gguf", skip=("layers", "lm_head"), allow_dequantize=True, **options)
    path = next(loaded.save(tmp_path / "out").glob("*.gguf"))
    theirs = polyquant.load(path, "llama-cpp", kv_cache_type="F32", flash_attention="off", allow_dequantize=True)
    expected = loaded.logits(TOKENS)
    assert (torch.as_tensor(theirs.logits(TOKENS)) - expected).abs().max() < 1e-3 * expected.abs().max()
    packed = polyquant.load(tmp_path / "dense", "gguf", type="Q4_0", **options)
    assert torch.equal(polyquant.load(packed.save(tmp_path / "q4"), **options).logits(TOKENS), packed.logits(TOKENS))


@pytest.mark.parametrize(("kind", "width"), [("Llama", 32), ("Qwen3", 128), ("Gemma2", 256), ("Gemma3Text", 256)])
def test_heads_of_a_width_of_their_own(tmp_path, kind, width):
    sizes = {**SIZES, "head_dim": width, "tie_word_embeddings": True}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")
    torch.manual_seed(0)
    model(config).float().save_pretrained(tmp_path / "dense")
    transformers.AutoTokenizer.from_pretrained(tiny_model("llama", tmp_path)).save_pretrained(tmp_path / "dense")
    dense = load_dense(resolve_dense(tmp_path / "dense"))
    with torch.inference_mode():
        expected = dense(torch.tensor([TOKENS])).logits[0].float()
    out = polyquant.quantize(tmp_path / "dense", "gguf", tmp_path / "out", type="Q8_0", device="cpu")
    loaded = polyquant.load(next(out.glob("*.gguf")), "llama-cpp", kv_cache_type="F32", flash_attention="off")
    found = torch.as_tensor(loaded.logits(TOKENS))
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
