"""2:4 sparse checkpoints, alone and beside quantization: half of the weights stay all that is kept."""

import pytest
import torch
from compressed_tensors.utils import pack_bitmasks, unpack_bitmasks
from polyquant.errors import ConfigError, ModelError
from polyquant.testing.checkpoints import assert_verified, changed_copy
from polyquant.testing.models import tiny_model
from polyquant_compressed_tensors._layers import CompressedLinear
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .conftest import load
from .sparsity import SPARSITY, halved, make_sparse, write_sparse

TOKENS = [3, 4, 5, 6, 7, 8, 9]
UP = "model.layers.1.mlp.up_proj"
QUANTIZED = {
    "fp8-dynamic": {"weights": "fp8", "dynamic_activations": True},
    "fp8-static": {"weights": "fp8", "strategy": "tensor", "static_activations": True},
    "int8-dynamic": {"weights": "int8", "dynamic_activations": True},
}


@pytest.fixture
def sparse(checkpoint, tmp_path):
    """A checkpoint with quantized weights, half of them 0 and left out; and the same with the zeros."""

    def make(name):
        zeros, out = tmp_path / "zeros", tmp_path / "sparse"

        def without_half(tensors):
            for key, tensor in tensors.items():
                if tensor.dtype in (torch.float8_e4m3fn, torch.int8) and key.endswith("proj.weight"):
                    whole = tensor.float()
                    whole[~halved(whole)] = 0
                    tensors[key] = whole.to(tensor.dtype)

        changed_copy(checkpoint(**QUANTIZED[name]), zeros, without_half)
        changed_copy(zeros, out, make_sparse, lambda config: config.update(sparsity_config=SPARSITY))
        return zeros, out

    return make


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_and_sparse_is_quantized_with_zeros(sparse, tmp_path, name):
    zeros, path = sparse(name)
    loaded, whole = load(path, kernel="library"), load(zeros, kernel="library")
    assert_verified(loaded)
    assert torch.equal(loaded.logits(TOKENS), whole.logits(TOKENS))
    mine, theirs = (each.model.get_submodule(UP) for each in (loaded, whole))
    assert mine.weight_packed.nbytes * 2 == theirs.weight_packed.nbytes
    saved = loaded.save(tmp_path / "saved")
    before, after = load_file(path / "model.safetensors"), load_file(saved / "packed.safetensors")
    assert before.keys() == after.keys()
    for key in (each for each in before if UP in each):
        assert (before[key].shape, before[key].dtype) == (after[key].shape, after[key].dtype)
        assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)), key
    assert torch.equal(load(saved, kernel="library").logits(TOKENS), loaded.logits(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_sparse_alone_is_the_dense_model_with_zeros(folder, tmp_path, name, dtype):
    """The masks and their expansion are the library's."""
    dense, out = tiny_model(name, folder / "dense"), tmp_path / "sparse"
    zeros = load_file(dense / "model.safetensors")
    for key, tensor in zeros.items():
        if key.endswith("proj.weight"):
            mask = halved(tensor)
            kept = tensor[mask].view(len(tensor), -1)
            back = torch.zeros_like(tensor)
            back[unpack_bitmasks(pack_bitmasks(mask), list(tensor.shape))] = kept.flatten()
            zeros[key] = back
    path = write_sparse(dense, out)
    loaded = load(path, compute_dtype=str(dtype).removeprefix("torch."), embeddings="keep", head="keep")
    assert_verified(loaded)
    assert {layer.scheme for layer in loaded.layers if layer.quantized} == {"sparse"}
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    model.load_state_dict({key: each.to(dtype) for key, each in zeros.items()}, strict=False)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS]), use_cache=False).logits[0].float()
    torch.testing.assert_close(loaded.logits(TOKENS), expected, rtol=1e-5, atol=1e-5)
    assert all(module.sparse for module in loaded.model.modules() if isinstance(module, CompressedLinear))


def test_a_layer_that_is_dense_though_the_config_does_not_say_so(folder, tmp_path):
    path = write_sparse(tiny_model("llama", folder / "dense"), tmp_path / "sparse")

    def dense(tensors):
        for part in ("compressed", "bitmask", "shape"):
            del tensors[f"{UP}.{part}"]
        tensors[f"{UP}.weight"] = torch.ones(512, 256)

    loaded = load(changed_copy(path, tmp_path / "changed", dense))
    assert f"2 layers are dense in the checkpoint: {UP}, lm_head" in loaded.notes
    assert (loaded.model.get_submodule(UP).weight == 1).all()


def test_sparse_layers_have_no_place_in_the_packed_layout(sparse):
    loaded = load(sparse("fp8-dynamic")[1], kernel="packed")
    assert any("no place in the packed layout" in note for note in loaded.notes)
    assert_verified(loaded)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop(f"{UP}.bitmask"), f"{UP} cannot be read: bitmask is missing"),
        (lambda t: t[f"{UP}.bitmask"].view(-1)[0].fill_(0), r"bitmask chooses \d+ to 128 of the 256 weights of a row"),
        (lambda t: t.update({f"{UP}.shape": torch.tensor([[512], [255]])}), r"shape says \[512, 255\], the model has"),
        (lambda t: t.update({f"{UP}.compressed": t[f"{UP}.compressed"][:, :-1].contiguous()}), "compressed of a layer"),
    ],
)  # fmt: skip
def test_damage_is_told(sparse, tmp_path, damage, words):
    with pytest.raises(ModelError, match=words):
        load(changed_copy(sparse("fp8-dynamic")[1], tmp_path / "damaged", damage))


def test_other_masks_are_refused_and_none_are_made(sparse, tmp_path, checkpoint):
    path = changed_copy(sparse("fp8-dynamic")[1], tmp_path / "other", None,
                        lambda config: config["sparsity_config"].update(format="sparse-bitmask"))  # fmt: skip
    with pytest.raises(ModelError, match=r"its weights are sparse \(sparse-bitmask\); sparse-24-bitmask is read"):
        load(path)
    with pytest.raises(ConfigError, match="read and saved here, and not made of a dense model"):
        checkpoint(weights="sparse")
