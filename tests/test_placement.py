"""Device maps from planned bytes, on devices that need not be there."""

import pytest
import torch
from polyquant.errors import ConfigError, PlacementError
from polyquant.memory.planned import plan_dense
from polyquant.models.weights import list_weights
from polyquant.options import BackendOptions
from polyquant.loading.placement import check_device_map, fill_devices

MIB = 2**20


@pytest.fixture
def model():
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, tie_word_embeddings=True
    )  # fmt: skip
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    return skeleton, [plan_dense(weight, BackendOptions()) for weight in list_weights(skeleton)]


def test_one_device_that_holds_everything(model):
    assert fill_devices(*model, "cuda", {0: "1GiB", "cpu": "1GiB"}, "error") == {"": 0}
    assert fill_devices(*model, "cpu", {"cpu": "1GiB"}, "error") == {"": "cpu"}


def test_several_devices_are_filled_in_order(model):
    skeleton, plans = model
    each = sum(plan.stored_bytes for plan in plans) * 3 // 4
    device_map = fill_devices(skeleton, plans, "cuda", {0: each, 1: each, "cpu": "1GiB"}, "error")
    assert set(device_map.values()) == {0, 1}
    assert device_map["model.embed_tokens"] == 0


def test_an_indexed_device_is_the_only_one_used(model):
    assert set(fill_devices(*model, "cuda:1", {0: "1GiB", 1: "1GiB", "cpu": "1GiB"}, "error").values()) == {1}


def test_what_would_spill_is_refused_and_can_be_allowed(model):
    small = {0: 6 * MIB, "cpu": "1GiB"}
    with pytest.raises(
        PlacementError,
        match=r"modules would not be on cuda: .* -> cpu.*planned \d+ MiB, room for 0: 6 MiB.*offload='cpu'",
    ):
        fill_devices(*model, "cuda", small, "error")


def test_offloading_is_allowed_where_asked(model):
    assert set(fill_devices(*model, "cuda", {0: 6 * MIB, "cpu": "1GiB"}, "cpu").values()) == {0, "cpu"}


def test_the_disk_is_never_used(model):
    with pytest.raises(PlacementError, match="-> disk"):
        fill_devices(*model, "cuda", {0: 6 * MIB, "cpu": MIB}, "cpu")


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ({"": "meta"}, "devices that are not here: the whole model -> meta; there are .*cpu"),
        ({"": "gpu"}, "the whole model -> gpu"),
        ({"": "cuda:77"}, "the whole model -> cuda:77"),
        ({"": 77}, "the whole model -> 77"),
        ({"": -1}, "the whole model -> -1"),
        ({"model.layer.0": "cpu"}, r"names 'model.layer.0', which is no module of the model. Did you mean 'model.layers.0'"),
        ({"model.layers": "cpu", "model.layers.8": "cpu"}, r"names 'model.layers.8', which is no module"),
        ({"model": "cpu", "model.layers.1.": "cpu"}, r"names 'model.layers.1.', which is no module"),
        ({"model.embed_tokens": "cpu", "model.norm": "cpu"}, r"gives 72 of 74 tensors no device: model.layers.0.self_attn"),
        ({"model.layers": "cpu"}, "gives 2 of 74 tensors no device: model.embed_tokens.weight, model.norm.weight; name"),
        ({"model.layers.1": "cpu", "model.layers.10": "cpu"}, "model.layers.10"),
        ({}, "must be 'auto' or a mapping"),
    ],
)  # fmt: skip
def test_a_map_that_does_not_fit_the_model_is_refused(model, device_map, words):
    weights = list_weights(model[0])
    with pytest.raises(ConfigError, match=words):
        check_device_map(device_map, weights)


@pytest.mark.parametrize(
    "device_map",
    [
        {"": "cpu"},
        {"model": "cpu"},  # the head is tied to the embedding in it
        {"": "cpu", "model.layers.3.mlp.up_proj": "disk"},
        {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"},
        {"model.embed_tokens.weight": "cpu", "model.layers": "cpu", "model.norm.weight": "cpu"},
    ],
)
def test_a_map_that_fits_the_model(model, device_map):
    assert check_device_map(device_map, list_weights(model[0])) == device_map
