"""Packed checkpoints that somebody changed: bitsandbytes' kernels would read past the end of tensors, or end in silence."""

import json

import polyquant
import pytest
import torch
from polyquant.errors import ModelError
from polyquant.testing.checkpoints import assert_verified, changed_copy, replaced
from polyquant.testing.models import tiny_model

UP = "model.layers.1.mlp.up_proj"
PRESETS = polyquant.backend("bitsandbytes").info.presets


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Preset -> a checkpoint, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("saved")

    def make(preset):
        out = folder / preset
        if not out.exists():
            polyquant.load(tiny_model("llama", folder), "bitsandbytes", device="cpu", **PRESETS[preset]).save(out)
        return out

    return make


def stated(**changes):
    """Changes the numbers of the 4-bit state, which is JSON in bytes."""

    def change(stored):
        state = json.loads(bytes(stored.tolist())) | changes
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return replaced(f"{UP}.weight.quant_state.bitsandbytes__nf4", change)


def filled(part, value):
    return replaced(f"{UP}.{part}", lambda tensor: torch.full_like(tensor, value))


STATES = [
    {"blocksize": 0}, {"blocksize": -64}, {"blocksize": 1}, {"blocksize": 2**40}, {"blocksize": "64"}, {"blocksize": None},
    {"blocksize": 64.5}, {"shape": [256, 512]}, {"shape": [512]}, {"shape": [512, 256, 1]}, {"shape": [-512, -256]},
    {"shape": [2**40, 2**40]}, {"shape": "all"}, {"quant_type": "fp4"}, {"quant_type": "int4"}, {"dtype": "load"},
    {"dtype": "int8"}, {"nested_blocksize": 256},
]  # fmt: skip
NESTED = [
    {"nested_blocksize": 0}, {"nested_blocksize": 2**40}, {"nested_blocksize": None}, {"nested_dtype": "int8"},
    {"nested_offset": "a"}, {"nested_offset": None}, {"blocksize": 128},
]  # fmt: skip
TENSORS = [
    ("nf4", filled("weight.absmax", -1.0), "weight.absmax holds -1.0"),
    ("nf4", filled("weight.absmax", float("inf")), "weight.absmax .* NaN or infinity"),
    ("nf4", filled("weight.quant_map", 0.5), "weight.quant_map is not the code book of nf4"),
    ("nf4-dq", filled("weight.nested_quant_map", 1e30), "weight.nested_quant_map holds"),
    ("nf4-dq", filled("weight.nested_absmax", -1.0), "weight.nested_absmax holds -1.0"),
    ("int8", filled("SCB", -1.0), "SCB holds -1.0"),
    ("int8", filled("weight_format", 3), "weight_format holds 3"),
    (
        "int8",
        replaced(f"{UP}.weight", lambda weight: weight.t().contiguous()),
        r"weight of a layer .* \(256, 512\) int8",
    ),
]


@pytest.mark.parametrize("change", STATES, ids=str)
def test_a_state_that_does_not_fit_is_refused(saved, tmp_path, change):
    path = changed_copy(saved("nf4"), tmp_path, stated(**change))
    with pytest.raises(ModelError, match=f"{UP} cannot be read: .*weight.quant_state.bitsandbytes__nf4"):
        polyquant.load(path, device="cpu")


@pytest.mark.parametrize("change", NESTED, ids=str)
def test_a_nested_state_that_does_not_fit_is_refused(saved, tmp_path, change):
    path = changed_copy(saved("nf4-dq"), tmp_path, stated(**change))
    with pytest.raises(ModelError, match=f"{UP} cannot be read: .*weight"):
        polyquant.load(path, device="cpu")


@pytest.mark.parametrize(("preset", "change", "words"), TENSORS)
def test_impossible_values_are_refused(saved, tmp_path, preset, change, words):
    path = changed_copy(saved(preset), tmp_path, change)
    with pytest.raises(ModelError, match=f"{UP} cannot be read: {words}"):
        polyquant.load(path, device="cpu")


def test_a_layer_without_its_parts_is_refused(saved, tmp_path):
    """A packed weight alone is no dense one."""

    def strip(tensors):
        for name in [name for name in tensors if name.startswith(f"{UP}.weight.")]:
            del tensors[name]

    path = changed_copy(saved("nf4"), tmp_path, strip)
    with pytest.raises(ModelError, match=f"{UP}"):
        polyquant.load(path, device="cpu")


@pytest.mark.parametrize("kernel", ["library", "packed"])
@pytest.mark.parametrize("preset", PRESETS)
def test_layers_whose_dense_weights_are_turned_are_read(tmp_path, preset, kernel):
    """GPT-2's Conv1D modules, (in_features, out_features), are packed as Linear ones are."""
    import transformers

    sizes = {
        "n_embd": 64,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": 384,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "dense")
    transformers.AutoTokenizer.from_pretrained(tiny_model("llama", tmp_path)).save_pretrained(tmp_path / "dense")
    loaded = polyquant.load(tmp_path / "dense", "bitsandbytes", device="cpu", kernel=kernel, **PRESETS[preset])
    assert_verified(loaded)
    expected = loaded.logits([3, 4, 5])
    loaded.save(tmp_path / "out")
    again = polyquant.load(tmp_path / "out", device="cpu", kernel=kernel)
    assert torch.equal(again.logits([3, 4, 5]), expected)
    assert_verified(again)


def without_prefix(tensors):
    """The names that the model without its head has: transformers puts the prefix before them as it loads."""
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.parametrize("preset", ["nf4", "nf4-dq", "int8"])
def test_names_without_the_prefix_of_the_model_are_read_and_checked(saved, tmp_path, preset):
    plain, tokens = polyquant.load(saved(preset), device="cpu"), [5, 6, 7, 8]
    loaded = polyquant.load(changed_copy(saved(preset), tmp_path / "plain", without_prefix), device="cpu")
    assert torch.equal(loaded.logits(tokens), plain.logits(tokens))
    assert_verified(loaded)

    def short(tensors):
        without_prefix(tensors)
        part = "SCB" if preset == "int8" else "weight.absmax"
        name = f"{UP.removeprefix('model.')}.{part}"
        tensors[name] = tensors[name][:1].clone()

    with pytest.raises(ModelError, match=rf"{UP} cannot be read: .*should be"):
        polyquant.load(changed_copy(saved(preset), tmp_path / "short", short), device="cpu")


def test_two_names_of_one_tensor_are_refused(saved, tmp_path):
    def twice(tensors):
        tensors[f"{UP.removeprefix('model.')}.weight"] = torch.zeros_like(tensors[f"{UP}.weight"])

    with pytest.raises(ModelError, match=rf"{UP} cannot be read: it is stored twice, as .*{UP}.weight"):
        polyquant.load(changed_copy(saved("int8"), tmp_path / "twice", twice), device="cpu")
