"""bitsandbytes through polyquant: the same model as the direct call, exact bytes, exact saves, and clear refusals."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import polyquant
import pytest
import torch
import transformers
from polyquant.errors import (
    CheckpointConflict,
    ConfigError,
    DenseModelError,
    EnvironmentProblem,
    ModelError,
    PlacementError,
    SaveError,
    UnknownBackend,
)

TOKENS = list(range(3, 35))
NF4 = {"bits": 4, "quant_type": "nf4"}
CONFIGURATIONS = {
    "nf4": (NF4, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}),
    "nf4-dq": (
        {**NF4, "double_quant": True},
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "float32",
        },
    ),
    "fp4": (
        {"quant_type": "fp4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32"},
    ),
    "int8": ({"bits": 8}, {"load_in_8bit": True}),
}


def load(model, **options):
    return polyquant.load(model, "bitsandbytes", device="cpu", compute_dtype="float32", **options)


def direct(model, native):
    config = transformers.BitsAndBytesConfig(**native)
    return transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    ).eval()


def same_as_direct(model, options, native, tokens):
    ours, theirs = load(model, **options), direct(model, native)
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        assert torch.equal(ours.model(ids).logits, theirs(ids).logits)
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


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("after_use", [False, True], ids=["fresh", "after a forward pass"])
def test_a_saved_checkpoint_loads_back_bit_for_bit(tiny, tmp_path, name, after_use):
    loaded = load(tiny, **CONFIGURATIONS[name][0])
    if after_use:
        loaded.logits(TOKENS)
    loaded.save(tmp_path / "out")
    fresh, again = (
        load(tiny, **CONFIGURATIONS[name][0]),
        polyquant.load(tmp_path / "out", compute_dtype="float32", device="cpu"),
    )
    ours, theirs = fresh.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(fresh.logits(TOKENS), again.logits(TOKENS))
    assert torch.equal(loaded.logits(TOKENS), again.logits(TOKENS))
    assert polyquant.verify(again).passed


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    return load(tiny, **NF4).save(tmp_path_factory.mktemp("saved") / "nf4")


def test_a_quantized_checkpoint_refuses_options_that_contradict_it_field_by_field(saved):
    with pytest.raises(
        CheckpointConflict, match=r"(?s)bits: requested 8, stored 4.*only compute_dtype can be chosen now"
    ):
        polyquant.load(saved, "bitsandbytes", bits=8)
    with pytest.raises(CheckpointConflict, match="quant_type: requested 'fp4', stored 'nf4'"):
        polyquant.load(saved, quant_type="fp4")
    assert polyquant.load(saved, quant_type="nf4", device="cpu").config.quant_type == "nf4"


def test_the_compute_dtype_of_a_quantized_checkpoint_can_be_chosen(saved):
    loaded = polyquant.load(saved, compute_dtype="bfloat16", device="cpu")
    linears = [module for module in loaded.model.modules() if hasattr(module, "compute_dtype")]
    assert {module.compute_dtype for module in linears} == {torch.bfloat16}
    assert loaded.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("stored", "error", "message"),
    [
        ({"quant_method": "frob"}, UnknownBackend, "quantized with 'frob', which no polyquant backend reads; installed backends read .*bitsandbytes"),
        ({"bits": 4}, ModelError, "names no quant_method; it holds bits"),
        ({"quant_method": "vptq"}, UnknownBackend, "quantized with 'vptq'"),
    ],
)  # fmt: skip
def test_an_unknown_method_is_an_error_that_names_the_reader(saved, tmp_path, stored, error, message):
    folder = shutil.copytree(saved, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    with pytest.raises(error, match=message):
        polyquant.load(folder)


def test_a_checkpoint_of_another_method_is_refused_by_name(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(CheckpointConflict, match="quantized already with 'gptq'; bitsandbytes reads bitsandbytes"):
        polyquant.load(folder, "bitsandbytes")


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


SAVE = """
import sys, polyquant
from polyquant.errors import PolyquantError
loaded = polyquant.load(sys.argv[1], "bitsandbytes", device="cpu", quant_type="nf4")
print("loaded", flush=True)
{before}
try:
    loaded.save(sys.argv[2], overwrite=True)
except PolyquantError as error:
    print(type(error).__name__, error)
print("saved", flush=True)
"""


def test_a_full_disk_during_save_leaves_the_old_checkpoint(tiny, saved, tmp_path):
    out = shutil.copytree(saved, tmp_path / "out")
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    code = SAVE.format(before=limit)
    result = subprocess.run(
        [sys.executable, "-c", code, tiny, out], capture_output=True, text=True, timeout=120, check=False
    )
    assert "SaveError writing" in result.stdout, result.stdout + result.stderr
    assert "is unchanged" in result.stdout
    assert [child.name for child in tmp_path.iterdir()] == ["out"]
    assert torch.equal(
        polyquant.load(out, device="cpu").logits(TOKENS), polyquant.load(saved, device="cpu").logits(TOKENS)
    )


def test_a_kill_during_save_leaves_the_old_checkpoint(tiny, saved, tmp_path):
    """Killed at several moments of writing; what lies at the destination always loads as the old or the new one."""
    random.seed(0)
    expected = polyquant.load(saved, device="cpu").logits(TOKENS)
    for attempt in range(4):
        out = shutil.copytree(saved, tmp_path / str(attempt) / "out")
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE.format(before=""), tiny, out], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "loaded\n"
        time.sleep(random.uniform(0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert torch.equal(polyquant.load(out, device="cpu").logits(TOKENS), expected)
        leftovers = [child.name for child in out.parent.iterdir() if child.name != "out"]
        assert all(name.startswith(".out.") for name in leftovers)


def test_quantize_writes_nothing_where_verification_fails(experts, tmp_path):
    with pytest.raises(SaveError, match="not written, because verification failed: coverage"):
        polyquant.quantize(experts, "bitsandbytes", tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SaveError, match="exists; choose another folder"):
        polyquant.quantize(experts, "bitsandbytes", tmp_path)


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
