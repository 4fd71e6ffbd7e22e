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
