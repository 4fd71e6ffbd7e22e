"""FBGEMM's FP8: rows with a scale each, as transformers names them, as the library rounds them; what is refused."""

import polyquant
import pytest
import torch
from polyquant.errors import ModelError
from polyquant.plugin.layers import PackedLinear
from polyquant.testing.checkpoints import assert_verified, changed_copy, replaced, without
from polyquant.testing.models import tiny_model
from polyquant_fp8._decode import E4M3, dequantize, quantize
from polyquant_fp8._modules import Fp8Linear
from polyquant_fp8.options import FbgemmOptions
from polyquant.testing.oracles import agree
from transformers import AutoModelForCausalLM
from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear

from .conftest import LAYER

TOKENS = [3, 4, 5, 6, 7, 8, 9, 10]
BIAS = "model.layers.0.self_attn.q_proj"


def load(path, **options):
    return polyquant.load(path, "fbgemm-fp8", device="cpu", **options)


@pytest.fixture(scope="module")
def checkpoint(folder):
    return load(tiny_model("qwen2", folder)).save(folder / "rows")


def rounded_by_rows(weight):
    """FBGEMM's rule, a row at a time: the greatest number of a row becomes 448."""
    codes, scales = torch.empty(weight.shape, dtype=E4M3), torch.empty(len(weight), 1)
    for number, row in enumerate(weight):
        inverse = 448.0 / max(row.abs().max(), torch.tensor(1e-12))
        codes[number] = (row * inverse).clamp(-448, 448).to(E4M3)
        scales[number] = 1 / inverse
    return codes, scales


@pytest.mark.parametrize("shape", [(256, 512), (203, 90)])
def test_rows_are_rounded_as_fbgemm_rounds_them(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    weight[5] = 0
    codes, scales = quantize(weight, FbgemmOptions().block)
    expected, of_rows = rounded_by_rows(weight)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, of_rows)
    agree("fbgemm-fp8", "FBGEMM's rule, row by row", dequantize(codes, scales, (1, -1)), expected.float() * of_rows)


def test_tensors_are_those_of_transformers_layer(checkpoint):
    """transformers runs it on GPUs alone, so what its layer takes is held against what is saved."""
    found = load(checkpoint, kernel="library").model.get_submodule(BIAS).state_dict()
    theirs = FbgemmFp8Linear(256, 256, bias=True).state_dict()
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in theirs.items()
    }


@pytest.mark.parametrize("kernel", ["library", "packed"])
def test_logits_are_those_of_the_weights_that_are_stored(folder, checkpoint, tmp_path, kernel):
    whole = {"embeddings": "keep", "head": "keep"}
    loaded = load(checkpoint, kernel=kernel, **whole)
    assert_verified(loaded)
    assert "asks for dynamic FP8 activations" in " ".join(loaded.notes)
    twin = AutoModelForCausalLM.from_pretrained(tiny_model("qwen2", folder))
    for name, module in load(checkpoint, kernel="library").model.named_modules():
        if hasattr(module, "scale_name"):
            twin.get_submodule(name).weight.data = module.weight.float() * module.weight_scale
    with torch.inference_mode():
        expected = twin(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(loaded.logits(TOKENS), expected, rtol=1e-4, atol=1e-4)
    kinds = {type(module) for module in loaded.model.modules() if isinstance(module, PackedLinear)}
    assert (kinds == {Fp8Linear}) == (kernel == "library")
    again = load(loaded.save(tmp_path / "again"), kernel=kernel, **whole)
    assert again.config == loaded.config
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))


@pytest.mark.parametrize(
    ("tensors", "stored", "words"),
    [
        (without(f"{LAYER}.weight_scale"), None, f"{LAYER}.weight is torch.float8_e4m3fn, and has no weight_scale"),
        (replaced(f"{LAYER}.weight_scale", lambda scales: scales[:1]), None, r"should be \(512, 1\) float, and is \(1, 1"),
        (replaced(f"{LAYER}.weight_scale", lambda scales: scales / 0), None, "holds NaN or infinity"),
        (None, {"activation_scale_ub": -1.0}, "cannot read its quantization_config"),
        (None, {"weight_block_size": [1, 1]}, "it has weight_block_size, which is not read"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(checkpoint, tmp_path, tensors, stored, words):
    path = changed_copy(checkpoint, tmp_path, tensors, stored and (lambda found: found.update(stored)))
    with pytest.raises(ModelError, match=words):
        load(path)
