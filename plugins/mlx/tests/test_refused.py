"""Checkpoints and options that are refused, with what is there and what to do."""

from functools import partial

import polyquant
import pytest
import torch
from polyquant.errors import CheckpointConflict, ConfigError, ModelError, SaveError
from polyquant.loading.stored import method_of
from polyquant.models.resolve import resolve
from polyquant.testing.checkpoints import changed_copy, replaced, without
from polyquant.testing.models import tiny_model

from .conftest import LAYER, TOKENS, load

CODES, SCALES, BIASES = (f"{LAYER}.{name}" for name in ("weight", "scales", "biases"))


@pytest.fixture
def changed(checkpoint, tmp_path):
    return partial(changed_copy, checkpoint(), tmp_path)


@pytest.fixture
def floats(checkpoint, tmp_path):
    return partial(changed_copy, checkpoint(mode="mxfp4"), tmp_path)


def config_without(path, *keys):
    import json

    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in keys}))
    return path


def test_it_is_recognized_by_what_it_is(checkpoint, changed):
    assert method_of(resolve(checkpoint())) == "mlx"
    older = config_without(changed(), "quantization_config")
    assert method_of(resolve(older)) == "mlx"
    assert torch.equal(
        polyquant.load(older, kernel="library", device="cpu").logits(TOKENS), load(checkpoint()).logits(TOKENS)
    )


def test_tensors_without_the_mark_are_refused(changed):
    path = config_without(changed(), "quantization", "quantization_config")
    with pytest.raises(ModelError, match=r"files hold what mlx packs .*'quantization' with group_size and bits"):
        polyquant.load(path)


def test_a_mark_without_the_tensors_is_refused(folder, checkpoint, tmp_path):
    import shutil

    path = shutil.copytree(tiny_model("llama", folder), tmp_path / "dense")
    shutil.copy(checkpoint() / "config.json", path)
    with pytest.raises(
        ModelError, match=r"says that it is quantized with 'mlx', and no layer .* weight in uint32, scales"
    ):
        polyquant.load(path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (without(BIASES), f"{LAYER} cannot be read: .*biases is missing; it has scales, weight"),
        (without(CODES), f"{LAYER} cannot be read: .*weight is missing"),
        (without("model.norm.weight"), r"model\.norm\.weight of the model is not in the checkpoint"),
        (replaced(CODES, lambda codes: codes[:-1]), r"affine4-g64, and weight .* \(512, 32\) uint32, and is \(511, 32\)"),
        (replaced(CODES, lambda codes: codes[:, :16].clone()), r"should be \(512, 32\) uint32, and is \(512, 16\) uint32"),
        (replaced(SCALES, lambda scales: scales / 0), f"{LAYER} .* NaN or inf"),
        (lambda tensors: tensors.update({f"{LAYER}.global_scale": torch.ones(1)}), "global_scale has no place beside"),
        (lambda tensors: tensors.update({"model.extra.scales": torch.ones(1, 1)}),
         r"1 packed layers are none of the model: model\.extra"),
    ],
)  # fmt: skip
def test_damaged_checkpoints_name_the_layer(changed, tensors, words):
    with pytest.raises(ModelError, match=words):
        load(changed(tensors))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (replaced(SCALES, lambda scales: torch.full_like(scales, 255)), "scales holds 255 to 255, and 0 to 254"),
        (lambda tensors: tensors.update({BIASES: torch.ones(512, 8)}), "biases has no place beside scales, weight"),
    ],
)
def test_damaged_floats_name_the_layer(floats, tensors, words):
    with pytest.raises(ModelError, match=words):
        load(floats(tensors))


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"bits": 7}, r"quantization has mode 'affine', 7 bits, groups of 64: affine has 2, 3, 4, 5, 6, 8 bits"),
        ({"mode": "nf4"}, "quantization has mode 'nf4'"),
        ({LAYER: {"group_size": 64, "bits": 4, "scheme": "x"}}, f"{LAYER} has .*scheme is not read"),
        ({"rotation": 1}, "its rotation is 1, which is not read"),
        ({"bits": 8}, r"its config says that it is affine8-g64, and weight of a layer"),
    ],
)
def test_configs_that_are_not_read(changed, stored, words):
    def change(found):
        found.update(stored)

    with pytest.raises(ModelError, match=words):
        load(changed(stored=change))


def test_contradictions_are_refused(checkpoint):
    with pytest.raises(CheckpointConflict, match="bits: requested 8, stored 4"):
        load(checkpoint(), bits=8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "mxfp4", "bits": 8}, "mxfp4 has 4 bits in groups of 32: leave bits and group_size out"),
        ({"group_size": 16}, "group_size of affine must be 32, 64 or 128, got 16"),
        ({"layout": "metal", "bits": 3}, "layout 'metal' is for affine weights of 2, 4 or 8 bits, not affine3"),
        ({"layout": "metal", "layers": {"mlp": "affine8-g64"}}, "layout 'metal' has one format for all"),
        ({"layers": {"mlp": "affine7-g64"}}, "layers: a format is 'affine2-g32'"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(ConfigError, match=words):
        polyquant.backend("mlx").config(options)


def test_groups_that_do_not_fit_are_refused_with_what_fits(folder):
    with pytest.raises(ConfigError, match=r"groups of 64 do not divide in_features 90.*vocabulary='dense'"):
        load(tiny_model("odd", folder))


def test_experts_with_metal_are_refused(folder):
    with pytest.raises(ConfigError, match="holds the experts of a layer in one tensor"):
        load(tiny_model("mixtral", folder), layout="metal")


def test_numbers_beyond_the_scales_dtype_are_refused(folder, tmp_path):
    big = changed_copy(tiny_model("llama", folder), tmp_path, replaced(CODES, lambda weight: weight * 1e6))
    with pytest.raises(ModelError, match=r"up_proj cannot be quantized: it holds numbers that float16 does not"):
        load(big, scale_dtype="float16")


def test_a_mixture_that_mlx_lm_has_no_name_for_is_not_written(folder, tmp_path):
    loaded = load(tiny_model("mixtral", folder))
    loaded.model.config.model_type = "another"
    with pytest.raises(SaveError, match="what mlx-lm calls those of another is not known here: there are mixtral"):
        loaded.save(tmp_path / "out")
