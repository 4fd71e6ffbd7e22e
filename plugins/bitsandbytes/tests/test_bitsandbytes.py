"""bitsandbytes through polyquant: the same model as the direct call, exact bytes, exact saves, and clear refusals."""

import shutil
import polyquant
import pytest
import torch
from polyquant.testing.oracles import agree
import transformers
from bitsandbytes.nn import Params4bit
from polyquant.errors import (
    ConfigError,
    DenseModelError,
    EnvironmentProblem,
    ModelError,
    PlacementError,
)

from polyquant.packed_weights import bands
from polyquant_bitsandbytes._quantize import quantize_4bit

from .conftest import CONFIGURATIONS, NF4, TOKENS, load


def direct(model, native):
    config = transformers.BitsAndBytesConfig(**native)
    found = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    ).eval()
    for module in found.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # which would compute in bfloat16
    return found


def same_as_direct(model, options, native, tokens):
    ours, theirs = load(model, **options), direct(model, native)
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        agree("bitsandbytes", "transformers' own load, logits", ours.model(ids).logits, theirs(ids).logits)
        arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
        assert torch.equal(ours.model.generate(ids, **arguments), theirs.generate(ids, **arguments))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_and_greedy_tokens_are_those_of_the_direct_call(tiny, name):
    same_as_direct(tiny, *CONFIGURATIONS[name], TOKENS)


@pytest.mark.real
def test_logits_and_greedy_tokens_are_those_of_the_direct_call_on_the_real_model():
    from polyquant.models.resolve import resolve_dense

    same_as_direct(str(resolve_dense("builtin:smollm2").path), *CONFIGURATIONS["nf4"], [504, 3575, 282, 4649, 314])


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("model", ["tiny", "odd"])
def test_verification_passes_and_the_plan_is_exact(request, model, name):
    loaded = load(request.getfixturevalue(model), **CONFIGURATIONS[name][0])
    report = polyquant.verify(loaded)
    assert report.passed, report.failures
    assert report.memory.weights_planned_bytes == report.memory.weights_stored_bytes
    assert {layer.scheme for layer in report.layers if layer.quantized} == {name.removesuffix("-dq")}


def test_blocks_of_64_with_float32_scales_take_four_and_a_half_bits(tiny):
    memory = polyquant.verify(load(tiny, **NF4)).memory
    codes = 16 * 4 * sum(layer.quantized for layer in load(tiny, **NF4).layers)
    assert 8 * (memory.quantized_bytes - codes) / memory.quantized_weights == 4.5


def test_skipped_modules_stay_dense_and_defaults_too(tiny):
    loaded = load(tiny, skip=("layers.0", "*.down_proj"), **NF4)
    dense = {
        layer.name: layer.reason for layer in loaded.layers if not layer.quantized and layer.role in ("linear", "head")
    }
    assert dense["model.layers.0.self_attn.q_proj.weight"] == "skipped on request"
    assert dense["model.layers.1.mlp.down_proj.weight"] == "skipped on request"
    assert "lm_head.weight" in dense
    assert polyquant.verify(loaded).passed
    whole = load(tiny, skip_defaults=False, **NF4)
    assert next(layer for layer in whole.layers if layer.name == "lm_head.weight").quantized
    assert polyquant.verify(whole).passed


def test_a_tied_head_stays_dense_whatever_is_asked(odd):
    loaded = load(odd, skip_defaults=False, **NF4)
    head = next(layer for layer in loaded.layers if layer.name == "lm_head.weight")
    assert (head.quantized, head.stored_bytes, head.reason) == (False, 0, "tied to model.embed_tokens.weight")
    assert polyquant.verify(loaded).passed


def test_a_skip_pattern_that_matches_nothing_is_an_error(tiny):
    with pytest.raises(ConfigError, match=r"skip pattern 'lmhead' matches no module; .*Did you mean 'lm_head'\?"):
        load(tiny, skip=("lmhead",))


def test_a_load_that_ends_dense_is_refused_unless_allowed(tiny):
    with pytest.raises(DenseModelError, match="left every tensor of the model dense"):
        load(tiny, skip=("*",))
    loaded = load(tiny, skip=("*",), allow_dequantize=True)
    assert "the model is dense" in loaded.notes[-1]
    assert not polyquant.verify(loaded).passed


def test_experts_that_stay_dense_fail_verification_by_name(experts):
    report = polyquant.verify(load(experts, **NF4))
    assert not report.passed
    (coverage,) = [check for check in report.failures if check.name == "coverage"]
    assert "model.layers.0.mlp.experts.gate_up_proj" in coverage.found
    assert "fused expert weights are no Linear modules" in coverage.found


def test_what_is_broken_after_loading_is_found(tiny):
    loaded = load(tiny, **NF4)
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("nan"))
    assert "finite logits" in [check.name for check in polyquant.verify(loaded).failures]
    loaded = load(tiny, **NF4)
    loaded.model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 128, bias=False)
    loaded.model.train()
    failures = {check.name: check.found for check in polyquant.verify(loaded).failures}
    assert "model.layers.0.mlp.up_proj.weight" in failures["coverage"]
    assert failures["eval mode"] == "training mode"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"device_map": {"": "disk"}}, "1 modules would not be on cpu: the whole model -> disk"),
        (
            {"max_memory": {"cpu": "60KB"}},
            r"modules would not be on cpu: .* -> disk; planned \d+ MiB, room for cpu: 0 MiB",
        ),
    ],
)
def test_a_device_map_that_spills_is_refused_before_loading(tiny, how, message):
    with pytest.raises(PlacementError, match=message):
        load(tiny, **how)


def test_bad_ways_to_load(tiny):
    with pytest.raises(
        EnvironmentProblem, match=r"(?s)bitsandbytes cannot run on cuda:99 here:.*fix: choose an available device"
    ):
        polyquant.load(tiny, "bitsandbytes", device="cuda:99")
    with pytest.raises(ConfigError, match="device_map must be 'auto' or a mapping"):
        load(tiny, device_map="balanced")
    with pytest.raises(ConfigError, match=r"name the backend to quantize it with .*installed: .*bitsandbytes"):
        polyquant.load(tiny)


def test_models_that_are_none(tiny, tmp_path):
    image = shutil.copytree(tiny, tmp_path / "image")
    (image / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    with pytest.raises(ModelError, match="is not a causal language model: its architecture 'vit'"):
        load(image)
    code = shutil.copytree(tiny, tmp_path / "code")
    (code / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}')
    with pytest.raises(ModelError, match=r"runs Python code of its own .*trust_remote_code=True"):
        load(code)
    untold = shutil.copytree(tiny, tmp_path / "untold")
    (untold / "tokenizer.json").unlink()
    (untold / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load(untold)


def test_generation_streams_and_explains(tiny):
    loaded = load(tiny, **NF4)
    pieces = list(loaded.stream("The capital of France", max_new_tokens=6, min_new_tokens=6, do_sample=False))
    assert len(pieces) > 1
    assert "".join(pieces) == loaded.generate(
        "The capital of France", max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    with pytest.raises(ConfigError, match="generate does not know a parameter.*maximum_tokens"):
        loaded.generate("The", maximum_tokens=3)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        loaded.generate("")
    with pytest.raises(ConfigError, match="no chat template"):
        loaded.generate([{"role": "user", "content": "hello"}])


def test_offloading_needs_a_word(tiny):
    from polyquant.models.resolve import resolve
    from polyquant.plugin import LoadRequest
    from polyquant_bitsandbytes._load import require_offload
    from polyquant_bitsandbytes.options import BitsAndBytesOptions

    device_map = {"model": "cuda:0", "lm_head": "cpu"}
    request = LoadRequest(source=resolve(tiny), device="cuda", device_map=device_map, offload="cpu")
    with pytest.raises(
        ConfigError, match="the device map uses cpu, cuda:0, .* accept float32 there with fp32_offload=True"
    ):
        require_offload(request, BitsAndBytesOptions())
    require_offload(request, BitsAndBytesOptions(fp32_offload=True))


def test_hook_calls_are_recorded(tiny, tmp_path):
    loaded = load(tiny, **NF4)
    loaded.save(tmp_path / "out")
    assert [record.hook for record in loaded.records] == ["load", "save"]
    assert all(record.seconds > 0 for record in loaded.records)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype", "storage"),
    [
        ((256, 512), torch.float32, torch.uint8),
        ((300, 192), torch.bfloat16, torch.bfloat16),
        ((203, 90), torch.float32, torch.uint8),  # blocks that end in the next row, and a last one that is short
    ],
)
def test_some_blocks_at_a_time_as_all_at_once(monkeypatch, shape, dtype, storage, nested, quant_type):
    monkeypatch.setitem(bands.BAND_WEIGHTS, "cpu", 2**12)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = {"quant_type": quant_type, "compress_statistics": nested, "quant_storage": storage}
    ours = quantize_4bit(weight, **options)
    theirs = Params4bit(weight.clone(), requires_grad=False, **options).to("cpu")
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert torch.equal(ours.data.view(torch.uint8), theirs.data.view(torch.uint8))
    states = [each.quant_state.as_dict(packed=True) for each in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    for own, other in ((vars(ours), vars(theirs)), (vars(ours.quant_state), vars(theirs.quant_state))):
        assert own.keys() == other.keys()
        assert {name: value for name, value in own.items() if isinstance(value, (bool, int, str, torch.dtype))} == {
            name: value for name, value in other.items() if isinstance(value, (bool, int, str, torch.dtype))
        }
