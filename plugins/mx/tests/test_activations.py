"""Emulated activations: a load rounds the inputs of its quantized layers, and of no others, as the format's kernels do."""

from functools import partial

import polyquant
import pytest
import torch
from polyquant.errors import ConfigError, UnsupportedOperation
from polyquant.plugin.activations import rounded
from polyquant.testing.checkpoints import adapter_gradients, assert_verified, changed_copy
from polyquant.testing.models import tiny_model
from polyquant_mx._decode import rotated
from polyquant_mx._modules import MxLinear

from .checkpoints import TOKENS

STATIC = 0.004
FORMATS = {
    "nvfp4": ("nvfp4", {}),
    "mxfp4": ("mxfp4", {}),
    "mxfp8": ("mxfp8", {}),
    "fp8": ("modelopt", {"quant_algo": "FP8"}),
    "fp8-block": ("modelopt", {"quant_algo": "FP8_PB_WO"}),
    "fp-quant-nvfp4": ("fp-quant", {"forward_dtype": "nvfp4"}),
    "fp-quant-mxfp4": ("fp-quant", {"forward_dtype": "mxfp4"}),
}


def load(path, backend, **options):
    return polyquant.load(path, backend, device="cpu", compute_dtype="float32", **options)


def logits(model):
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0]


def linears(loaded):
    return {name: module for name, module in loaded.model.named_modules() if isinstance(module, MxLinear)}


def expected(plain, config):
    """Logits of the dense model with the weights of `plain`, each quantized layer of which is given rounded inputs."""
    layers = linears(plain)
    weights = {weight.name.removesuffix(".weight"): weight for weight in plain.settled.weights}
    hows = {name: (config.activations_of(weights[name]), layer) for name, layer in layers.items()}
    model = plain.model.dequantize()
    for name, (how, layer) in hows.items():
        model.get_submodule(name).register_forward_pre_hook(partial(_rounding, how, layer))
    return logits(model)


def _rounding(how, layer, module, arguments):
    (inputs,), rotation = arguments, layer.part("rotation")
    if rotation is None:
        return rounded(inputs, how, layer.static_scale)
    return rotated(rounded(rotated(inputs, rotation), how, layer.static_scale), rotation.T)


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_of_quantized_layers_are_rounded(folder, name):
    backend, options = FORMATS[name]
    path = tiny_model("llama", folder)
    loaded, plain = load(path, backend, emulate_activations=True, **options), load(path, backend, **options)
    found, exact = logits(loaded.model), logits(plain.model)
    wanted = expected(plain, loaded.config)
    step = float((wanted - exact).abs().mean())
    assert step > 1e-3  # rounding is there to be seen
    assert float((found - wanted).abs().mean()) < 0.1 * step  # sums in another order flip a few roundings
    what = loaded.emulated_activations
    assert what == {"fp8-block": "fp8"}.get(name, name.removeprefix("fp-quant-"))
    assert loaded.kernel.endswith(f"activations rounded to {what} in software (emulated)")
    assert any("activations are emulated" in note for note in loaded.notes)
    assert_verified(loaded)
    report = polyquant.verify(loaded, max_new_tokens=2)
    assert report.emulated_activations == what


def test_a_scale_of_the_checkpoint_is_taken(folder, tmp_path):
    saved = load(tiny_model("llama", folder), "modelopt", quant_algo="FP8").save(tmp_path / "fp8")

    def with_scales(tensors):
        names = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
        tensors |= {f"{name}.input_scale": torch.tensor(STATIC) for name in names}

    path = changed_copy(saved, tmp_path / "static", tensors=with_scales)
    loaded, plain = load(path, "modelopt", emulate_activations=True), load(path, "modelopt")
    assert {float(layer.static_scale) for layer in linears(loaded).values()} == {float(torch.tensor(STATIC))}
    wanted = expected(plain, loaded.config)
    dynamic = load(saved, "modelopt", emulate_activations=True)
    assert float((logits(loaded.model) - wanted).abs().mean()) < 0.02 * float(
        (logits(dynamic.model) - wanted).abs().mean()
    )


def test_experts_get_rounded_inputs(mxfp4_checkpoint):
    loaded, plain = load(mxfp4_checkpoint, "mxfp4", emulate_activations=True), load(mxfp4_checkpoint, "mxfp4")
    assert loaded.emulated_activations == "mxfp4"
    stack, same = (each.model.model.layers[0].mlp.experts.down_proj for each in (loaded, plain))
    inputs = torch.randn(3, stack.shape[1], generator=torch.Generator().manual_seed(0))
    how = loaded.config.activations_of(loaded.settled.weights[0])
    assert torch.equal(stack.multiply(1, inputs), same.multiply(1, rounded(inputs, how)))
    assert not torch.equal(logits(loaded.model), logits(plain.model))
    with pytest.raises(UnsupportedOperation, match="more than a weight and a bias"):
        loaded.model.dequantize()


def test_what_is_saved_and_measured_of_weights_knows_nothing_of_it(folder, tmp_path):
    from polyquant.memory.effective import effective_weight

    path = tiny_model("llama", folder)
    loaded, plain = load(path, "nvfp4", emulate_activations=True), load(path, "nvfp4")
    name, layer = next(iter(linears(loaded).items()))
    assert torch.equal(
        effective_weight(layer, layer.in_features), effective_weight(linears(plain)[name], layer.in_features)
    )
    assert layer.rounds_activations
    again = load(loaded.save(tmp_path / "saved"), "nvfp4")
    assert torch.equal(logits(again.model), logits(plain.model))
    with pytest.raises(UnsupportedOperation, match="more than a weight and a bias"):
        loaded.model.dequantize()


def test_adapters_get_gradients_through_the_rounding(folder):
    loaded = load(tiny_model("llama", folder), "nvfp4", emulate_activations=True)
    gradients = adapter_gradients(loaded.model, TOKENS)
    assert gradients
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    assert sum(float(gradient.abs().sum()) for gradient in gradients.values()) > 0


@pytest.mark.parametrize(
    ("backend", "options", "words"),
    [
        ("modelopt", {"quant_algo": "W4A16_AWQ"}, "modelopt's format .int4. multiply with activations as they are"),
        ("nvfp4", {"kernel": "packed"}, "kernel='packed' multiplies in polyquant's packed layout"),
    ],
)
def test_formats_that_round_no_activations_are_refused(folder, backend, options, words):
    with pytest.raises(ConfigError, match=words):
        load(tiny_model("llama", folder), backend, emulate_activations=True, **options)
