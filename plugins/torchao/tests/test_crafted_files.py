"""Packed checkpoints that somebody changed: what torchao is told in the header to put together, and codes out of range."""

import json
import shutil

import polyquant
import pytest
import torch
from polyquant.errors import ModelError
from polyquant.testing.models import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    dense = tiny_model("llama", folder)
    polyquant.load(dense, "torchao", device="cpu", weights="int4").save(folder / "int4")
    return folder / "int4"


def changed(saved, out, tensors=None, described=None):
    shutil.copytree(saved, out)
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    if described is not None:
        metadata[f"{UP}.weight"] = described(json.loads(metadata[f"{UP}.weight"]))
    save_file(load_file(saved / "model.safetensors") | (tensors or {}), out / "model.safetensors", metadata)
    return out


@pytest.mark.parametrize(
    "data",
    [
        {"block_size": [1, 64]}, {"block_size": [32, 1]}, {"block_size": [1, 0]}, {"block_size": [1, -32]},
        {"block_size": [1, 2**60]}, {"block_size": None}, {"block_size": []}, {"dtype": {"_type": "torch.dtype", "_data": "load"}},
        {"dtype": None}, {"target_dtype": {"_type": "torch.dtype", "_data": "int8"}}, {"target_dtype": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_description_that_does_not_fit_is_refused(saved, tmp_path, data):
    path = changed(
        saved, tmp_path / "out", described=lambda found: json.dumps(found | {"_data": found["_data"] | data})
    )
    with pytest.raises(ModelError, match=f"{UP} cannot be read: the header's metadata"):
        polyquant.load(path, device="cpu")


@pytest.mark.parametrize(
    "whole",
    [{"_type": "Int8Tensor"}, {"_type": "os.system"}, {"_type": None}, {"_data": []}, {"_tensor_data_names": ["qdata"]}, {"_tensor_data_names": 1}],
    ids=str,
)  # fmt: skip
def test_another_tensor_than_the_config_says_is_refused(saved, tmp_path, whole):
    path = changed(saved, tmp_path / "out", described=lambda found: json.dumps(found | whole))
    with pytest.raises(ModelError, match=f"{UP} cannot be read: the header's metadata"):
        polyquant.load(path, device="cpu")


@pytest.mark.parametrize("part", ["qdata", "zero_point"])
@pytest.mark.parametrize("value", [8, -9, 127])
def test_codes_out_of_range_are_refused(saved, tmp_path, part, value):
    name = f"{UP}._weight_{part}"
    codes = torch.full_like(load_file(saved / "model.safetensors")[name], value)
    with pytest.raises(ModelError, match=f"{UP} cannot be read: _weight_{part} holds {value} to {value}, and -8 to 7"):
        polyquant.load(changed(saved, tmp_path / "out", {name: codes}), device="cpu")


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        (polyquant.plan, "torchao cannot read this checkpoint: group_size 48 does not divide in_features 256 .* stored with it"),
        (polyquant.load, r"q_proj cannot be read: .* blocks of \[1, 48\] were expected"),
    ],
    ids=["plan", "load"],
)  # fmt: skip
def test_a_stored_group_size_that_does_not_fit_is_the_checkpoints(saved, tmp_path, verb, words):
    """Options that are stored cannot be chosen: none is advised."""
    path = changed(saved, tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["quant_type"]["default"]["_data"]["granularity"]["_data"]["group_size"] = 48
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words) as caught:
        verb(path, "torchao", device="cpu")
    assert "skip=" not in str(caught.value)
    assert "use group_size" not in str(caught.value)
