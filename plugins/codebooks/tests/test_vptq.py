"""VPTQ's layers against those of vptq itself, in torch on a CPU; what is refused."""

import sys
import types

import polyquant
import pytest
import torch
from polyquant.errors import ModelError
from polyquant.testing.checkpoints import adapter_gradients, assert_verified, changed_copy, replaced, without
from polyquant.testing.models import tiny_model
from polyquant_codebooks._decode import stream
from polyquant_codebooks._layers import linear_from_tensors
from polyquant_codebooks.vptq.options import VptqLayer, VptqOptions
from polyquant.testing.oracles import agree

from .checkpoints import make_vptq, words_of
from .conftest import LAYER, TOKENS

BASE = {
    "vector_lens": (-1, 8), "num_centroids": (-1, 256), "num_res_centroids": (-1, -1), "group_num": 1, "group_size": 48,
    "outlier_size": 0, "enable_norm": True, "enable_perm": True,
}  # fmt: skip
LAYERS = {
    "one table": {},
    "two tables": {"num_res_centroids": (-1, 64)},
    "wide indices": {"num_centroids": (-1, 4096), "num_res_centroids": (-1, 4096)},
    "padded rows": {"vector_lens": (-1, 6), "num_centroids": (-1, 8)},
    "groups": {"group_num": 3, "group_size": 16, "num_res_centroids": (-1, 256)},
    "outliers": {"vector_lens": (4, 8), "num_centroids": (32, 256), "group_size": 40, "outlier_size": 8},
    "plain": {"enable_norm": False, "enable_perm": False},
}


@pytest.fixture(scope="module")
def library():
    """vptq's layer. Its packing module imports sentence_transformers for the type of an argument alone."""
    with pytest.MonkeyPatch.context() as patch:
        named = types.ModuleType("sentence_transformers.SentenceTransformer")
        named.SentenceTransformer = object
        patch.setitem(sys.modules, "sentence_transformers", types.ModuleType("sentence_transformers"))
        patch.setitem(sys.modules, named.__name__, named)
        vptq = pytest.importorskip("vptq")
    return vptq.VQuantLinear


@pytest.mark.parametrize("name", LAYERS)
def test_layers_answer_as_those_of_vptq(library, name):
    settings = {**BASE, **LAYERS[name]}
    torch.manual_seed(0)
    rows, columns = 70, 48
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    theirs = library(columns, rows, **own, indices_as_float=False, is_indice_packed=True, bias=True, dtype=torch.float32,
                     enable_proxy_error=False)  # fmt: skip
    for parameter in theirs.parameters():
        if parameter.is_floating_point():
            parameter.data = torch.randn(parameter.shape)
        else:
            parameter.data = torch.randint(-(2**31), 2**31, parameter.shape).to(parameter.dtype)
    layer = VptqLayer(**settings)
    if layer.has_outliers:
        theirs.outlier_indices.data = torch.randint(0, 32, theirs.outlier_indices.shape).to(torch.int16)
    if layer.enable_perm:
        theirs.perm.data = torch.randperm(columns).to(torch.int16)
    with torch.inference_mode():
        expected = theirs(torch.eye(columns)[None])[0].T - theirs.bias[:, None]
    tensors = dict(theirs.state_dict())
    config = VptqOptions(layers=(("proj", layer),))
    ours = linear_from_tensors("model.proj", torch.nn.Linear(columns, rows), config, torch.float32, tensors)
    agree("vptq", "vptq's layer in torch", ours.dequantize(), expected, allowed=1e-5)
    x = torch.randn(2, 3, columns)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 7, 8, 13, 24, 31, 32])
def test_a_stream_of_codes_is_read_as_it_is_defined(bits):
    codes = torch.randint(0, 2**bits, (3, 37), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(stream(words_of(codes, bits), bits, 37), codes)


@pytest.fixture(scope="module")
def checkpoint(folder):
    return make_vptq(tiny_model("qwen2", folder), "2bit", folder / "vptq")


def test_a_checkpoint_loads_trains_and_is_saved(checkpoint, tmp_path):
    loaded = polyquant.load(checkpoint, device="cpu")
    assert_verified(loaded)
    saved = loaded.save(tmp_path / "again")
    again = polyquant.load(saved, "vptq", device="cpu")
    assert again.config == loaded.config
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))
    gradients = adapter_gradients(loaded.backend.prepare_for_training(loaded), TOKENS)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


def of_layer(setting, value):
    return lambda stored: stored["config_for_layers"][LAYER].update({setting: value})


@pytest.mark.parametrize(
    ("tensors", "stored", "words"),
    [
        (without(f"{LAYER}.centroids.weight"), None, "centroids.weight is missing"),
        (
            replaced(f"{LAYER}.indices", lambda indices: indices[:, :-1].clone()),
            None,
            r"indices of a layer .* should be",
        ),
        (replaced(f"{LAYER}.perm", torch.zeros_like), None, "perm should name each of 256 columns once"),
        (replaced(f"{LAYER}.weight_scale", lambda scale: scale / 0), None, "holds NaN or infinity"),
        (None, of_layer("num_centroids", [-1, 33]), "should be|holds"),
        (None, of_layer("num_res_centroids", [-1, 128]), "second table that is larger than the first"),
        (None, of_layer("num_res_centroids", [8, 64]), "second table of its outliers"),
        (None, of_layer("group_size", 200), "1 groups of 200 columns and 0 outliers are not its 256"),
        (None, of_layer("is_indice_packed", False), "is_indice_packed of .* is False; True is read"),
        (None, of_layer("rotation", 1), "has rotation, which is not read"),
        (None, lambda stored: stored["config_for_layers"].pop(LAYER), "no settings for this layer"),
        (None, lambda stored: stored.update(bits=2), "it has bits, which is not read"),
    ],
)
def test_what_does_not_fit_is_refused(checkpoint, tmp_path, tensors, stored, words):
    with pytest.raises(ModelError, match=words):
        polyquant.load(changed_copy(checkpoint, tmp_path, tensors, stored), device="cpu")


def test_an_index_beyond_its_table_is_refused(checkpoint, tmp_path):
    """Of a table of 48 vectors, whose indices have 6 bits."""
    cut = replaced(f"{LAYER}.centroids.weight", lambda table: table[:, : 48 * 6].clone())
    path = changed_copy(checkpoint, tmp_path, cut, of_layer("num_centroids", [-1, 48]))
    with pytest.raises(ModelError, match="indices holds 6[0-3], and there are 48"):
        polyquant.load(path, device="cpu")
