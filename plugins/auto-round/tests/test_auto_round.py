"""AutoRound on small random models: options, formats, tuning, skipped modules, damaged and other tools' checkpoints."""

import json
import shutil
import polyquant
import pytest
import torch
import transformers
from polyquant.errors import CheckpointConflict, ConfigError, ModelError
from polyquant.testing.checkpoints import adapter_gradients
from polyquant.testing.models import tiny_model
from polyquant.testing.texts import CALIBRATION
from polyquant_auto_round import _kernels
from polyquant_auto_round.options import AutoRoundOptions
from safetensors.torch import load_file, save_file

from .conftest import quantize


TOKENS = [3, 4, 5, 6, 7, 8, 9]


LAYER = "model.layers.1.mlp.up_proj"


OWN: dict[str, object] = {}


FITTED = {"sym": False}  # packed as AWQ does


GPTQ = {"format": "auto_gptq", "skip": ("layers.0.mlp",)}


AWQ = {"format": "auto_awq", "sym": False, "skip": ("layers.0.mlp",)}


def load(path, **options):
    return polyquant.load(path, "auto-round", device="cpu", **options)


def dense_weight(folder, name, model="llama"):
    return load_file(folder / model / "model.safetensors")[f"{name}.weight"]


def multiplied(layer):
    """The weight of a packed layer as its kernel sees it, (out_features, in_features)."""
    identity = torch.eye(layer.infeatures)
    if _kernels.is_fast(layer.bits):
        return _kernels.multiply(layer, identity).T
    return (layer(identity) - layer(torch.zeros(1, layer.infeatures))).detach().T


def copied(path, tmp_path, **changes):
    """A copy of a checkpoint, with changes to its quantization_config; None takes a key away."""
    out = tmp_path / "copy"
    shutil.copytree(path, out)
    config = json.loads((out / "config.json").read_text())
    stored = config["quantization_config"] | changes
    config["quantization_config"] = {name: value for name, value in stored.items() if value is not None}
    (out / "config.json").write_text(json.dumps(config))
    return out


def change_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    save_file(change(tensors), path / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, "bits must be 2, 3, 4 or 8, got 5"),
        ({"group_size": 48}, "group_size must be -1, 32"),
        ({"bits": 8, "sym": False}, "no 8-bit weights with fitted zero points"),
        ({"bits": 2, "format": "auto_awq"}, "format='auto_awq' holds 4 bits, not 2"),
        ({"samples": 4}, "samples need iters above 0"),
        ({"iters": -1}, "iters must be"),
        ({"format": "auto_gtpq"}, "Did you mean 'auto_gptq'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        polyquant.backend("auto-round").config(options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (OWN, 0.095),
        (FITTED, 0.091),
        (GPTQ, 0.095),
        (AWQ, 0.091),
        ({"bits": 8, "group_size": -1, "skip_defaults": False}, 0.0085),
        ({"model": "qwen2", "bits": 2, "sym": False, "group_size": 32}, 0.405),
        ({"model": "qwen2", "bits": 3}, 0.19),
    ],
    ids=str,
)
def test_formats_are_read_back_as_what_they_were_made_of(made, folder, options, error):
    path, model = made(**options), options.get("model", "llama")
    loaded = polyquant.load(path, "auto-round", device="cpu")
    for name in options.keys() - {"model", "skip"}:
        assert getattr(loaded.config, name) == options[name]
    report = polyquant.verify(loaded, max_new_tokens=2)
    assert not [check for check in report.failures if check.name != "sample"]
    weight, dense = multiplied(loaded.model.get_submodule(LAYER)), dense_weight(folder, LAYER, model)
    assert 0.8 < (weight - dense).norm() / dense.norm() / error < 1.1
    stays = {layer.name for layer in loaded.layers if layer.role in ("linear", "head") and not layer.quantized}
    skipped = (
        {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")} if "skip" in options else set()
    )
    assert stays == skipped | ({"lm_head.weight"} if options.get("skip_defaults", True) else set())
    assert {layer.reason for layer in loaded.layers if layer.name in skipped} <= {"skipped on request"}


@pytest.mark.parametrize("options", [{"bits": 2, "sym": False, "group_size": 32}, {"bits": 3}], ids=str)
def test_products_are_those_of_the_unpacked_weight(made, options):
    loaded = load(made("qwen2", **options), compute_dtype="float32")
    layer = loaded.model.get_submodule("model.layers.0.self_attn.q_proj")
    rounded = "int8" in loaded.kernel
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for inputs in (torch.randn(1, 1, layer.infeatures), torch.randn(2, 20, layer.infeatures)):
            expected = torch.nn.functional.linear(inputs, multiplied(layer), layer.bias)
            error = (layer(inputs) - expected).norm() / expected.norm()
            assert error < (0.01 if rounded else 1e-5)
            assert error > (1e-3 if rounded else -1)  # what the kernel's name says it does


def test_compute_dtype_is_obeyed_whatever_the_checkpoint_says(made):
    for options in (OWN, GPTQ, {"model": "qwen2", "bits": 3}):
        for dtype in ("float32", "bfloat16", "float16"):
            loaded = load(made(**options), compute_dtype=dtype)
            assert {str(value.dtype) for value in loaded.model.parameters()} == {f"torch.{dtype}"}
            assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
            assert loaded.logits(TOKENS).isfinite().all()


def test_tuning_pays_and_its_settings_are_stored(made, folder, capfd):
    """Less error of the block's output than plain rounding, on the text that is tuned with."""
    rounded, tuned = made(), made(calibration=CALIBRATION, iters=30, sample_tokens=64, samples=8, progress=True)
    assert "Quantizing" in capfd.readouterr().err
    loaded = load(tuned)
    assert (loaded.config.iters, loaded.config.sample_tokens, loaded.config.samples) == (30, 64, 8)
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    ids = loaded.tokenizer(" ".join(CALIBRATION), return_tensors="pt").input_ids[:, :256]

    def error(path):
        with torch.no_grad():
            expected = dense.model(ids).last_hidden_state
            return (load(path, compute_dtype="float32").model.model(ids).last_hidden_state - expected).norm()

    assert error(tuned) < 0.95 * error(rounded)
    with pytest.raises(CheckpointConflict, match="iters: requested 0, stored 30"):
        load(tuned, iters=0)


def test_calibration_text_is_used_or_refused(folder, tmp_path):
    llama = tiny_model("llama", folder)
    with pytest.raises(ConfigError, match="iters=0 weights are rounded without calibration text"):
        quantize(llama, tmp_path / "out", calibration=CALIBRATION)
    with pytest.raises(ConfigError, match="at least 256 are needed"):
        quantize(llama, tmp_path / "out", calibration=["Too short."], iters=1)
    assert not (tmp_path / "out").exists()


def test_layers_that_do_not_fit_are_named_before_anything_is_written(folder, tmp_path):
    for model, words in (
        ("odd", r"32 weights together, which does not divide 90 x 90 in model\.layers\.0\.self_attn\.q_proj\.weight"),
        ("mixtral", r"model\.layers\.0\.mlp\.experts\.gate_up_proj is no Linear module"),
    ):
        with pytest.raises(ConfigError, match=words):
            quantize(tiny_model(model, folder), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"group_size 512 does not divide in_features 256 in .*q_proj"):
        quantize(tiny_model("llama", folder), tmp_path / "out", group_size=512)


def test_a_missing_kernel_is_a_problem_and_the_slow_one_says_so(made, monkeypatch):
    fast = load(made(), compute_dtype="float32").logits(TOKENS)
    monkeypatch.setattr(_kernels, "INSTALLED", False)
    loaded = load(made(), compute_dtype="float32")
    assert "torch matmul" in loaded.kernel
    assert any("auto-round-lib is not there" in note for note in loaded.notes)
    report = polyquant.verify(loaded, max_new_tokens=2)
    assert not [check for check in report.failures if check.name != "sample"]
    assert (loaded.logits(TOKENS) - fast).norm() / fast.norm() < 0.05
    with pytest.raises(polyquant.errors.EnvironmentProblem, match="auto-round-lib only"):
        load(made(**AWQ))
    monkeypatch.setattr("polyquant.support.libraries.installed_version", lambda name: None)
    missing = {problem.fix for problem in polyquant.backend("auto-round").problems("cpu")}
    assert {
        f"pip install '{library.requirement}'" for library in polyquant.backend("auto-round").info.libraries
    } <= missing


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_type": "mx_fp"}, "its weights are mx_fp, and int is read"),
        ({"act_bits": 8}, "it uses act_bits, which is not read"),
        ({"packing_format": "auto_round:llm_compressor"}, "its layout is 'llm_compressor'"),
        ({"quant_method": "gptq", "desc_act": True}, r"reordered \(desc_act\).*backend='gptq'"),
        ({"quant_method": "awq", "version": "gemv"}, "its layout is 'gemv'"),
        ({"bits": 5}, "cannot read its quantization_config"),
        ({"group_size": 32}, r"q_proj cannot be read: qzeros of .* should be \(8, 32\) int32, and is \(4, 32\)"),
        ({"bits": 8}, r"qweight of a layer .* should be"),
    ],
)
def test_what_is_not_read_is_refused(made, tmp_path, changes, words):
    with pytest.raises(ModelError, match=words):
        load(copied(made(), tmp_path, **changes))


def test_checkpoints_of_other_tools(made, tmp_path):
    """Keys that auto-round, gptqmodel and autoawq write or leave out, in the same layouts."""
    own = dict.fromkeys(("iters", "skip_modules", "skip_defaults", "nsamples", "seqlen", "sym", "data_type"))
    expected = load(made(**GPTQ)).logits(TOKENS)
    gptq = copied(made(**GPTQ), tmp_path / "gptq", **own, checkpoint_format="gptq", provider=None)
    loaded = load(gptq)
    assert torch.equal(loaded.logits(TOKENS), expected)
    assert loaded.config.sym
    expected = load(made(**AWQ)).logits(TOKENS)
    awq = copied(
        made(**AWQ), tmp_path / "awq", **own, bits=None, group_size=None, w_bit=4,
        q_group_size=64, version="GEMM",
    )  # fmt: skip
    assert torch.equal(load(awq).logits(TOKENS), expected)
    for stored, iters in (({"enable_quanted_input": None}, 200), ({"enable_quanted_input": False}, 0)):
        own_format = copied(made(), tmp_path / f"own{iters}", iters=None, **stored)
        assert load(own_format).config.iters == iters
    stored = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": "auto_round:auto_awq"}
    assert AutoRoundOptions.from_stored(stored | {"sym": False}).format == "auto_round"


def test_damaged_checkpoints_name_the_tensor(made, tmp_path):
    path = copied(made(), tmp_path)
    change_tensors(path, lambda all_: {name: value for name, value in all_.items() if name != f"{LAYER}.scales"})
    with pytest.raises(ModelError, match=f"{LAYER} cannot be read: scales is missing"):
        load(path)
    change_tensors(path, lambda all_: {name: value for name, value in all_.items() if not name.endswith("norm.weight")})
    with pytest.raises(
        ModelError, match=r"layers\.0\.input_layernorm\.weight, .* of the model are not in the checkpoint"
    ):
        load(path)


def test_fitted_zero_points_of_a_symmetric_checkpoint_are_refused(made, tmp_path):
    """auto-round-lib would not read them, and answer with something else."""
    path = copied(made(), tmp_path)
    change_tensors(path, lambda all_: all_ | {f"{LAYER}.qzeros": all_[f"{LAYER}.qzeros"] + 1})
    with pytest.raises(ModelError, match=f"{LAYER} cannot be read: its zero points are fitted"):
        load(path)


def test_reordered_columns_are_refused(made, tmp_path):
    path = copied(made(**GPTQ), tmp_path)
    change_tensors(path, lambda all_: all_ | {f"{LAYER}.g_idx": all_[f"{LAYER}.g_idx"].flip(0).contiguous()})
    with pytest.raises(ModelError, match=f"{LAYER} cannot be read: its columns are reordered"):
        load(path)


@pytest.mark.parametrize("options", [{"bits": 2, "sym": False, "group_size": 32}, {"bits": 3}], ids=str)
def test_adapters_get_the_gradients_of_the_dequantized_model(made, folder, options):
    loaded = load(made("qwen2", **options), compute_dtype="float32")
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder / "qwen2")
    for name, module in loaded.model.named_modules():
        if hasattr(module, "polyquant_scheme"):
            dense.get_submodule(name).weight.data = multiplied(module).contiguous()

    expected = adapter_gradients(dense, TOKENS)
    found = adapter_gradients(loaded.backend.prepare_for_training(loaded), TOKENS)
    assert found.keys() == {name for name in expected if "lora" in name}
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < (0.1 if "int8" in loaded.kernel else 1e-4), name
