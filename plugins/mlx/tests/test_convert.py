"""`polyquant convert` to and from MLX: mlx's own functions and mlx-lm read what comes out."""

import polyquant
import pytest
import torch
from polyquant.errors import ConversionRefused
from polyquant.measure.quality.divergence import kl_divergence
from polyquant.testing.models import tiny_model
from safetensors.torch import load_file

pytest.importorskip("polyquant_gguf")
pytest.importorskip("gguf")
TOKENS = list(range(5, 37))


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)])
def test_gguf_becomes_mlx_and_comes_back(tmp_path, kind, bits):
    """Bit-equal both ways; mlx dequantizes the very numbers, and mlx-lm runs the folder."""
    core = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    source = polyquant.quantize(tiny_model("llama", tmp_path), "gguf", tmp_path / "gguf", type=kind, device="cpu")
    there = polyquant.convert(source, "mlx", tmp_path / "mlx")
    assert there.exact and (there.options["bits"], there.options["group_size"]) == (bits, 32)
    assert polyquant.convert(tmp_path / "mlx", f"gguf:type={kind}", tmp_path / "back").exact
    before = polyquant.load(source, device="cpu", kernel="packed")
    name = "model.layers.1.mlp.up_proj"
    tensors = load_file(tmp_path / "mlx" / "model.safetensors")
    parts = [core.array(tensors[f"{name}.{part}"].numpy()) for part in ("weight", "scales", "biases")]
    scales = [part.astype(core.float32) for part in parts[1:]]
    theirs = torch.tensor(core.dequantize(parts[0], *scales, group_size=32, bits=bits).tolist())
    mine = before.model.get_submodule(name).dequantize()
    torch.testing.assert_close(theirs, mine, rtol=0, atol=float(mine.abs().max()) * 2**-21)
    model, _ = mlx_lm.load(str(tmp_path / "mlx"))
    found = torch.tensor(model(core.array([TOKENS]))[0].astype(core.float32).tolist())
    assert float(kl_divergence(before.logits(TOKENS), found).mean()) < 1e-3


def test_floats_of_four_bits(tmp_path):
    source = polyquant.quantize(tiny_model("llama", tmp_path), "gguf", tmp_path / "gguf", type="MXFP4", device="cpu")
    there = polyquant.convert(source, "mlx", tmp_path / "mlx")
    assert there.exact and there.options["mode"] == "mxfp4"
    assert polyquant.convert(tmp_path / "mlx", "gguf", tmp_path / "back").exact


def test_the_experts_of_a_mixture_go_with_it(tmp_path):
    """To GGUF and back, bit-equal; mlx-lm, and llama.cpp where it is here, run what was written."""
    core, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    source = polyquant.quantize(tiny_model("mixtral", tmp_path), "gguf", tmp_path / "gguf", type="Q4_1", device="cpu")
    there = polyquant.convert(source, "mlx", tmp_path / "mlx")
    assert there.exact
    assert {layer.shape for layer in there.layers if ".experts." in layer.name} == {(1024, 256), (256, 512)}
    expected = polyquant.load(source, kernel="library", device="cpu").logits(TOKENS)
    model, _ = mlx_lm.load(str(tmp_path / "mlx"))
    found = torch.tensor(model(core.array([TOKENS]))[0].astype(core.float32).tolist())
    assert float(kl_divergence(expected, found).mean()) < 1e-3
    assert polyquant.convert(tmp_path / "mlx", "gguf", tmp_path / "back").exact
    again = polyquant.load(tmp_path / "back", kernel="library", device="cpu")
    assert torch.equal(again.logits(TOKENS), expected)
    with pytest.raises(ConversionRefused, match="experts of 4 layers .*: it holds the experts of a layer"):
        polyquant.convert(tmp_path / "mlx", "hqq", tmp_path / "out")
