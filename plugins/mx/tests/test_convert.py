"""`polyquant convert` to MXFP4 and NVFP4 of checkpoints that hold the same blocks: bit-equal, there and back."""

from typing import get_args

import polyquant
import pytest
import torch
from polyquant.errors import ConversionRefused, Misfit
from polyquant.plugin.layers import WeightCodes
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model
from polyquant_mx import formats
from polyquant_mx._layers import unpack
from polyquant_mx.formats import ALGOS
from polyquant_mx.options import Algo, ModelOptOptions, Mxfp4Options, Nvfp4Options

from .checkpoints import TOKENS

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def made(folder):
    """A checkpoint of each backend."""
    return {
        name: polyquant.load(tiny_model("qwen2", folder), name, device="cpu", kernel="library").save(
            folder / f"to-{name}"
        )
        for name in ("mxfp4", "nvfp4")
    }


def weights_of(path, backend=None):
    return polyquant.load(path, backend, device="cpu", kernel="packed", compute_dtype="float32")


@pytest.mark.parametrize(
    ("name", "through"),
    [("mxfp4", "compressed-tensors"), ("nvfp4", "compressed-tensors"), ("mxfp4", "mlx"), ("mxfp4", "gguf"),
     ("nvfp4", "fouroversix")],
)  # fmt: skip
def test_there_and_back_every_weight_is_the_same(made, tmp_path, name, through):
    pytest.importorskip(f"polyquant_{through.replace('-', '_')}")
    there = polyquant.convert(made[name], through, tmp_path / "there", backend=name)
    back = polyquant.convert(there.out, name, tmp_path / "back")
    whole = there.exact and back.exact  # scales of NVFP4 that are divided by elsewhere may differ in the last bit
    assert whole or (name, max(row.largest_difference for row in (*there.layers, *back.layers)) < 1e-6) == (
        "nvfp4",
        True,
    )
    before, after = weights_of(made[name], name), weights_of(tmp_path / "back", name)
    one, other = (each.model.get_submodule(LAYER).dequantize() for each in (before, after))
    torch.testing.assert_close(other, one, rtol=0 if whole else 1e-6, atol=0)
    torch.testing.assert_close(after.logits(TOKENS), before.logits(TOKENS), rtol=1e-3, atol=1e-3)
    assert_verified(after)
    assert after.config.to_stored()["quant_method"] == before.config.to_stored()["quant_method"]


def test_mlxs_nvfp4_becomes_nvidias(folder, tmp_path):
    """Back it does not go: MLX has no scale of the whole matrix."""
    pytest.importorskip("polyquant_mlx")
    pytest.importorskip("mlx.core")
    mlx = polyquant.load(tiny_model("qwen2", folder), "mlx:mode=nvfp4", device="cpu", kernel="library").save(
        tmp_path / "mlx"
    )
    assert polyquant.convert(mlx, "nvfp4", tmp_path / "nvfp4").exact


def test_modelopts_files_come_of_others_too(made, tmp_path):
    mine = polyquant.convert(made["nvfp4"], "modelopt", tmp_path / "modelopt", backend="nvfp4")
    assert mine.exact
    assert polyquant.load(tmp_path / "modelopt", device="cpu").backend.name == "modelopt"


def test_what_is_no_e2m1_in_such_blocks_is_refused(folder, made, tmp_path):
    nf4 = polyquant.load(tiny_model("qwen2", folder), "bitsandbytes", bits=4, device="cpu").save(tmp_path / "nf4")
    for target in ("mxfp4", "nvfp4"):
        with pytest.raises(ConversionRefused, match=f"{target} has no place .*E2M1 in groups of"):
            polyquant.convert(nf4, target, tmp_path / "out")
    with pytest.raises(ConversionRefused, match="E2M1 in groups of 16 is held"):
        polyquant.convert(made["mxfp4"], "nvfp4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_of_odd_width_are_filled_up():
    codes = torch.randint(0, 16, (6, 40), dtype=torch.uint8)
    weight = WeightCodes(
        name="proj", shape=(6, 40), codes=codes, scales=torch.full((6, 2), 0.25), group_size=32,
        table=torch.tensor(formats.E2M1),
    )  # fmt: skip
    found = unpack(weight, Mxfp4Options())
    assert found["weight_blocks"].shape == (6, 2, 16)
    assert found["weight_scales"].tolist() == [[125, 125]] * 6
    with pytest.raises(Misfit, match="E2M1"):
        Nvfp4Options.holding([weight.held])
    with pytest.raises(Misfit, match="fp8, and formats of single layers, are made of dense weights alone"):
        unpack(weight, ModelOptOptions(quant_algo="FP8"))


def test_every_name_of_modelopts_has_a_format():
    assert set(get_args(Algo)) == set(ALGOS)
