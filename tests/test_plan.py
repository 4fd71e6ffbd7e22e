"""Plans from headers and configs: published figures, key-value caches, peaks, devices, budgets, and bad input."""

import json
import shutil
from pathlib import Path

import polyquant
import pytest
from polyquant.models import versions
from polyquant.errors import CheckpointConflict, ConfigError, ModelError, UnsupportedOperation
from polyquant.models.builtin import packaged_gguf
from polyquant.testing.models import tiny_model

CONFIGS = Path(__file__).parent / "configs"
NF4 = {"backend": "bitsandbytes", "bits": 4, "quant_type": "nf4", "compute_dtype": "bfloat16", "memory": "4TiB"}


@pytest.mark.parametrize(
    ("name", "parameters", "plain", "double"),
    [
        ("llama-2-7b", 6_738_415_616, 0.31, 0.29),
        ("llama-3-8b", 8_030_261_248, 0.38, 0.36),
        ("qwen2.5-0.5b", 494_032_768, 0.48, 0.46),
    ],
)
def test_published_figures_from_configs_alone(name, parameters, plain, double):
    one = polyquant.plan(CONFIGS / f"{name}.json", **NF4)
    two = polyquant.plan(CONFIGS / f"{name}.json", **NF4, double_quant=True)
    assert one.weights_dense_bytes == 2 * parameters
    assert (round(one.ratio, 2), round(two.ratio, 2)) == (plain, double)
    assert one.checkpoint_bytes == 0


def test_bytes_of_a_layer_have_their_parts():
    plan = polyquant.plan(CONFIGS / "llama-2-7b.json", **NF4)
    layer = next(tensor for tensor in plan.tensors if tensor.name == "model.layers.0.mlp.up_proj.weight")
    weights = 11008 * 4096
    assert (layer.shape, layer.dtype, layer.scheme, layer.quantized) == ((11008, 4096), "float16", "nf4", True)
    assert layer.constant_bytes == 4 * weights // 64 + 64  # absmax and the code book
    assert layer.stored_bytes == weights // 2 + layer.constant_bytes
    head = next(tensor for tensor in plan.tensors if tensor.name == "lm_head.weight")
    assert (head.quantized, head.reason) == (False, "the output head stays dense by default")


@pytest.mark.parametrize("name", ["llama-3-70b", "deepseek-v3"], ids=["70 billion", "671 billion, experts"])
def test_large_models_are_planned_in_little_memory(run_python, name):
    """How long it takes is measured in `nox -s bench`."""
    code = f"""
import polyquant
from polyquant.memory.peak import measure_peak
with measure_peak() as peak:
    plan = polyquant.plan({str(CONFIGS / name)!r} + '.json', 'bitsandbytes', memory='1TiB')
print(peak.peak_bytes, plan.weights_dense_bytes)
"""
    result = run_python(code=code)
    assert result.returncode == 0, result.stderr
    peak, dense = map(int, result.stdout.split())
    assert peak < (1 if versions.VERSION_5 else 1.25) * 2**30  # before 5 each expert is a module of its own
    assert dense == {"llama-3-70b": 2 * 70_553_706_496, "deepseek-v3": 2 * (671_026_419_200 - 58 * 256)}[name]


def cache(config, context, batch=1):
    return polyquant.plan(config, **NF4, context=context, batch=batch).kv_cache_bytes


def test_the_cache_follows_the_models_layout():
    assert cache(CONFIGS / "llama-2-7b.json", 4096) == 2 * 32 * 4096 * 4096 * 2  # a key and a value for each head
    assert cache(CONFIGS / "llama-3-8b.json", 4096, batch=2) == 2 * 2 * 32 * 8 * 128 * 4096 * 2  # 8 of 32 heads


@pytest.mark.skipif(
    not versions.VERSION_5, reason="before transformers 5 caches keep every token, whatever the layer sees"
)
def test_the_cache_follows_what_layers_see(tmp_path):
    assert cache(CONFIGS / "deepseek-v3.json", 100) == 61 * (512 + 64) * 100 * 2  # latent attention

    def written(**config):
        path = tmp_path / f"{config['model_type']}.json"
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
        path.write_text(json.dumps({name: value for name, value in {**sizes, **config}.items() if value is not ...}))
        return path

    each = 2 * 2 * 8 * 2  # bytes a token and layer
    sliding = written(model_type="mistral", sliding_window=16)
    assert cache(sliding, 8) == 4 * each * 8
    assert cache(sliding, 100) == 4 * each * 15  # the next token completes the window
    mixed = written(
        model_type="gemma3_text", sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2
    )
    assert cache(mixed, 100) == 2 * each * 15 + 2 * each * 100
    hybrid = written(
        model_type="lfm2", layer_types=["conv", "full_attention", "conv", "full_attention"], conv_L_cache=3
    )
    assert cache(hybrid, 101) - cache(hybrid, 100) == 2 * each  # its convolutions do not grow
    one_head = written(model_type="falcon", multi_query=True, num_kv_heads=1, head_dim=...)
    assert cache(one_head, 10) == 4 * (2 * 8 * 2) * 10


def test_planned_cache_is_what_transformers_keeps(tmp_path):
    import torch
    from polyquant.loading import dense
    from polyquant.memory.storage import tensor_bytes
    from polyquant.models.resolve import resolve_dense

    model = tiny_model("mixtral", tmp_path)
    planned = polyquant.plan(model, "bitsandbytes", compute_dtype="float32", context=24)
    with torch.inference_mode():
        outputs = dense.load_dense(resolve_dense(model))(input_ids=torch.arange(24)[None], use_cache=True)
    assert planned.kv_cache_bytes == tensor_bytes(outputs.past_key_values)


def test_headers_say_what_the_checkpoint_is(tmp_path):
    folder = tiny_model("llama-tied", tmp_path)
    plan = polyquant.plan(folder, "bitsandbytes", bits=8)
    assert plan.checkpoint_bytes == (folder / "model.safetensors").stat().st_size
    assert {tensor.dtype for tensor in plan.tensors if tensor.role == "linear"} == {"float32"}
    head = next(tensor for tensor in plan.tensors if tensor.name == "lm_head.weight")
    assert (head.stored_bytes, head.reason) == (0, "tied to model.embed_tokens.weight")
    assert plan.load_peak_bytes > plan.checkpoint_bytes
    assert plan.load_peak_bytes - plan.reclaimable_bytes <= plan.needed_bytes <= plan.run_peak_bytes
    assert sum(tensor.stored_bytes for tensor in plan.tensors) == plan.weights_planned_bytes


def test_no_weight_is_read(tmp_path):
    """A checkpoint whose data is not there, only its header and a hole, is planned all the same."""
    folder = shutil.copytree(tiny_model("llama", tmp_path), tmp_path / "hollow")
    path = folder / "model.safetensors"
    size, content = path.stat().st_size, path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    with path.open("wb") as file:
        file.write(content[:header])
        file.truncate(size)
    whole = polyquant.plan(tiny_model("llama", tmp_path), "bitsandbytes", bits=4, memory="1GiB")
    hollow = polyquant.plan(folder, "bitsandbytes", bits=4, memory="1GiB")
    assert hollow.tensors == whole.tensors


def test_a_gguf_is_planned_from_its_header():
    plan = polyquant.plan(packaged_gguf("builtin:smollm2"), "gguf")
    assert plan.options["type"] == "file"
    layer = next(tensor for tensor in plan.tensors if tensor.name == "model.layers.0.mlp.up_proj.weight")
    assert (layer.scheme, layer.stored_bytes) == ("Q4_1", 1536 * 576 // 32 * 20)


def test_a_runtime_without_a_plan_maps_the_file():
    if "llama-cpp" not in polyquant.backends().names:
        pytest.skip("llama-cpp is not installed")
    plan = polyquant.plan("builtin:smollm2", "llama-cpp")
    assert 0.9 * plan.checkpoint_bytes < plan.weights_planned_bytes < plan.checkpoint_bytes
    with pytest.raises(UnsupportedOperation, match="make its checkpoint first.*polyquant quantize"):
        polyquant.plan(CONFIGS / "llama-3-8b.json", "llama-cpp")


def test_a_quantized_checkpoint_is_planned_as_it_is(bitsandbytes, tmp_path):
    written = polyquant.load(tiny_model("llama", tmp_path), "bitsandbytes", bits=4, device="cpu").save(tmp_path / "q")
    plan = polyquant.plan(written, "bitsandbytes", device="cpu")
    loaded = polyquant.load(written, device="cpu")
    assert plan.weights_planned_bytes == pytest.approx(sum(l.stored_bytes for l in loaded.initial_layers), rel=0.01)
    with pytest.raises(CheckpointConflict, match="requested 8, stored 4"):
        polyquant.plan(written, "bitsandbytes", bits=8)


def test_verification_reports_the_planned_peak(bitsandbytes, tmp_path):
    folder = tiny_model("llama", tmp_path)
    loaded = polyquant.load(folder, "bitsandbytes", bits=4, device="cpu")
    memory = polyquant.verify(loaded).memory
    (record,) = [record for record in loaded.records if record.hook == "load"]
    assert record.held_bytes <= memory.load_peak_bytes
    assert record.held_bytes < memory.load_peak_planned_bytes < 2 * memory.load_peak_bytes


def test_a_load_far_from_its_plan_is_noted():
    from polyquant.loading.checks import load_peak_note
    from polyquant.types import HookRecord

    def record(peak):
        return HookRecord(backend="b", hook="load", seconds=1, peak_bytes=peak, device="cpu", held_bytes=1)

    assert load_peak_note(record(110), 100) == []
    assert load_peak_note(record(None), 100) == []
    (note,) = load_peak_note(record(200 * 2**20), 100 * 2**20)
    assert "the load's peak was 200.0 MiB, 100% more than planned (100.0 MiB)" in note


# devices


def devices(spec, **more):
    return polyquant.plan(CONFIGS / "llama-3-70b.json", "bitsandbytes", bits=4, devices=spec, **more)


def test_modules_are_placed_on_devices_that_are_not_here():
    plan = devices("cuda:0=24GiB,cuda:1=24GiB,cpu=64GiB")
    assert (plan.device, plan.compute_dtype, plan.process_bytes) == ("cuda", "bfloat16", 0)
    assert set(plan.device_map.values()) == {"cuda:0", "cuda:1"}
    assert plan.spilled == ()
    assert [entry.device for entry in plan.placed] == ["cuda:0", "cuda:1", "cpu"]
    assert all(entry.weights_bytes <= entry.room_bytes for entry in plan.placed)
    assert sum(entry.weights_bytes for entry in plan.placed) == plan.weights_planned_bytes
    assert plan.memory_bytes == 48 * 2**30


def test_what_would_spill_is_named():
    plan = devices("cuda:0=24GiB,cpu=64GiB")
    assert "model.layers.79" in plan.spilled
    assert "spill to cpu: a load refuses that, unless offload='cpu' (--offload cpu) allows it" in plan.notes[-1]
    allowed = devices("cuda:0=24GiB,cpu=64GiB", offload="cpu")
    assert allowed.notes[-1].endswith("spill to cpu")
    nowhere = devices("cuda:0=24GiB,cpu=4GiB", offload="cpu")
    assert "they fit nowhere, and a load refuses that" in nowhere.notes[-1]


def test_offload_is_refused_where_the_backend_cannot():
    with pytest.raises(ConfigError, match="hqq cannot offload"):
        polyquant.plan(CONFIGS / "llama-3-8b.json", "hqq", devices="cuda=8GiB,cpu=8GiB", offload="cpu")


# bad input


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cuda:0=24gigs", "a size is written as 6GiB"),
        ("cuda:0", "devices are written as 'cuda:0=24GiB"),
        ("gpu:0=24GiB", "devices are written as"),
        ("cuda:x=24GiB", "devices are written as"),
        ("cuda:0=1GiB,cuda=2GiB", "gives cuda:0 twice"),
    ],
)
def test_devices_that_cannot_be_read(spec, message):
    with pytest.raises(ConfigError, match=message):
        devices(spec)


@pytest.mark.parametrize("memory", ["6 gigabytes", "lots", "-1GiB", "", 0])
def test_budgets_that_cannot_be_read(memory):
    with pytest.raises(ConfigError, match="a size"):
        polyquant.plan(CONFIGS / "llama-3-8b.json", "bitsandbytes", memory=memory)


def test_arguments_that_contradict_each_other():
    with pytest.raises(ConfigError, match="either memory .* or devices"):
        devices("cuda=24GiB", memory="1GiB")
    with pytest.raises(ConfigError, match="context and batch are 1 or more"):
        devices("cuda=24GiB", context=0)
    with pytest.raises(ConfigError, match="offload must be 'error', 'cpu' or 'disk', got 'gpu'"):
        devices("cuda=24GiB", offload="gpu")
    with pytest.raises(ConfigError, match="offload='disk' is for a CPU, and this is cuda"):
        devices("cuda=24GiB", offload="disk")
    with pytest.raises(ConfigError, match="name the backend that bits belongs to"):
        polyquant.plan(CONFIGS / "llama-3-8b.json", bits=4)
    with pytest.raises(ConfigError, match="quant_type must be 'nf4' or 'fp4'"):
        polyquant.plan("nowhere/nothing", "bitsandbytes", quant_type="nf5")


def test_a_device_that_is_not_here_needs_a_size():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match="cuda is not here, so its room is not known; give it with --memory"):
        polyquant.plan(CONFIGS / "llama-3-8b.json", "bitsandbytes", device="cuda")
    assert polyquant.plan(CONFIGS / "llama-3-8b.json", "bitsandbytes", device="cuda", memory="24GiB").fits


def config_of(tmp_path, **changed):
    path = tmp_path / "config.json"
    content = {**json.loads((CONFIGS / "qwen2.5-0.5b.json").read_text()), **changed}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    return path


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "qwen99"}, "its architecture 'qwen99' is not one that transformers .* knows; update"),
        ({"model_type": ...}, "its config names no model_type"),
        ({"model_type": "vit"}, "is not a causal language model"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"hidden_size": 2**62}, "transformers makes no model of its config"),
        ({"hidden_size": -896}, "transformers makes no model of its config"),
        ({"num_attention_heads": 0}, "transformers"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "own"}, "runs Python code of its own"),
    ],
    ids=["unknown architecture", "none", "no language model", "absurd", "overflow", "negative", "zero", "own code"],
)
def test_configs_that_cannot_be_planned(tmp_path, changed, message):
    with pytest.raises(ModelError, match=message):
        polyquant.plan(config_of(tmp_path, **changed), "bitsandbytes", memory="1TiB")


def test_a_config_of_another_model_than_the_weights(tmp_path):
    folder = shutil.copytree(tiny_model("llama", tmp_path), tmp_path / "swapped")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 1024}))
    with pytest.raises(ModelError, match=r"has the shape .* in its weight files, and .* by its config.json"):
        polyquant.plan(folder, "bitsandbytes")


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(ModelError, match="no such file or folder; .* holds "):
        polyquant.plan(tmp_path / "nothing", "bitsandbytes")
    with pytest.raises(ModelError, match="config-of-mine.json: no such file; . holds "):
        polyquant.plan("config-of-mine.json", "bitsandbytes")
