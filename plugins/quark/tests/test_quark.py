"""Quark on small random models: every format against Quark itself, options, what is refused, what is left behind."""

import sys
from pathlib import Path

import polyquant
import pytest
import torch
from polyquant.errors import ConfigError, EnvironmentProblem, ModelError
from polyquant.testing.checkpoints import assert_verified, changed_copy, put
from polyquant.testing.models import tiny_model
from polyquant.testing.processes import run_python
from polyquant.types import WeightInfo
from polyquant_quark._layers import NIBBLES, QuarkLinear, quark_linear
from polyquant_quark._library import COMPILED, quiet_quark, wait_for_kernels
from polyquant_quark.options import QuarkOptions
from polyquant_quark.planning import plan_layers
from polyquant.testing.oracles import agree
from torch.utils import cpp_extension
from transformers import AutoModelForCausalLM

TOKENS = [3, 4, 5, 6, 7, 8, 9]
FORMATS = [
    {"weights": "int4", "group_size": 32},
    {"weights": "int4", "granularity": "channel"},
    {"weights": "uint4"},
    {"weights": "uint4", "granularity": "channel"},
    {"weights": "int8"},
    {"weights": "int8", "granularity": "group"},
    {"weights": "fp8"},
    {"weights": "fp8", "granularity": "tensor"},
    {"weights": "mxfp4"},
]
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def made(folder):
    """Makes checkpoints of the small llama, each once; not to be changed."""

    def make(**options):
        out = folder / "-".join(map(str, options.values()))
        if not out.exists():
            polyquant.quantize(tiny_model("llama", folder), "quark", out, device="cpu", **options)
        return out

    return make


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int2"}, "weights must be 'int4', 'uint4', 'int8', 'fp8' or 'mxfp4', got 'int2'"),
        ({"weights": "fp8", "granularity": "group"}, "granularity of fp8 must be channel or tensor, not 'group'"),
        ({"weights": "int8", "group_size": 64}, "group_size applies to granularity='group' only, not to 'channel'"),
        ({"weights": "mxfp4", "group_size": 64}, "group_size of mxfp4 is always 32, got 64"),
        ({"bits": 3}, "quark has nothing with bits=3; bits are 4, 8"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        polyquant.quantize("nowhere", "quark", "nowhere-either", **options)


@pytest.mark.parametrize("options", FORMATS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_checkpoint_is_read_as_quark_reads_it(made, tmp_path, options):
    path = made(**options)
    loaded = polyquant.load(path, device="cpu")
    assert all(getattr(loaded.config, name) == value for name, value in options.items())
    assert_verified(loaded)
    with quiet_quark(progress=False):
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        logits = theirs(torch.tensor([TOKENS])).logits[0].detach()
    layers = {name: layer for name, layer in loaded.model.named_modules() if isinstance(layer, QuarkLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        other = theirs.get_submodule(name)
        agree("quark", "Quark's layers", layer.dequantize(), other._get_qweight(other.weight))
    torch.testing.assert_close(loaded.logits(TOKENS), logits)
    again = polyquant.load(loaded.save(tmp_path / "out"), device="cpu")
    assert again.config == loaded.config
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))


@pytest.mark.parametrize("packing", NIBBLES)
def test_four_bits_in_words(packing):
    """Bit positions of the format's description: 8 neighbours a word, or the even ones before the odd ones."""
    codes = torch.randint(-8, 8, (16, 24))
    order = range(8) if packing == "order" else (0, 2, 4, 6, 1, 3, 5, 7)
    words = [
        sum((int(codes[row, word * 8 + column]) & 15) << 4 * place for place, column in enumerate(order))
        for row in range(16)
        for word in range(3)
    ]
    packed = torch.tensor([word - 2**32 if word >= 2**31 else word for word in words], dtype=torch.int32).view(16, 3)
    zeros, scale = torch.zeros(2, dtype=torch.int32), torch.rand(16).bfloat16()
    tensors = {"weight": packed, "weight_scale": scale, "weight_zero_point": zeros}
    options = QuarkOptions(weights="int4", granularity="channel")
    layer = quark_linear(torch.nn.Linear(24, 16, bias=False), options, torch.float32, packing, tensors)
    assert torch.equal(layer.dequantize(), codes.float() * scale.float().view(-1, 1))


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        (
            (64, 96),
            {},
            r"group_size 64 does not divide in_features 96 in a\.q_proj\.weight \(64, 96\); use group_size=32 or skip",
        ),
        ((64, 90), {"weights": "mxfp4"}, r"32 does not divide in_features 90 in .*; use skip=\('q_proj',\)"),
        ((60, 64), {}, "8 4-bit weights share a word, and do not divide out_features 60 in"),
        ((64, 60), {"granularity": "channel"}, "8 4-bit weights share a word, and do not divide in_features 60 in"),
    ],
)
def test_a_layer_that_does_not_fit_is_named(shape, options, words):
    weight = WeightInfo(name="a.q_proj.weight", shape=shape, dtype="float32", role="linear", module="Linear")
    with pytest.raises(ConfigError, match=words):
        plan_layers([weight], QuarkOptions(**options))


def weight_of(stored):
    return stored["global_quant_config"]["weight"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda stored: stored.pop("export"), "a Quark before 1.0 of its format"),
        (lambda stored: stored["export"].update(weight_format="fake_quantized"), "its weights are fake_quantized"),
        (lambda stored: stored["export"].update(pack_method="other"), "its pack_method is 'other'"),
        (lambda stored: stored["global_quant_config"].update(input_tensors={"dtype": "int8"}), "input_tensors too"),
        (lambda stored: stored.update(layer_quant_config={"*up_proj": {}}), "it has a layer_quant_config"),
        (lambda stored: stored.update(kv_cache_quant_config={"*": {}}), "it has a kv_cache_quant_config"),
        (lambda stored: stored.update(algo_config=[{"name": "rotation"}]), "it was made with 'rotation'"),
        (lambda stored: stored["global_quant_config"].update(weight=[{}, {}]), "quantized in several steps"),
        (lambda stored: weight_of(stored).update(dtype="int3"), "its weights are int3"),
        (lambda stored: weight_of(stored).update(scale_format="e8m0"), "scale_format 'e8m0' is not read"),
        (lambda stored: weight_of(stored).update(ch_axis=1), "ch_axis 1 is not read"),
        (lambda stored: weight_of(stored).update(qscheme="per_tensor", ch_axis=None), "granularity of int8 must be"),
    ],
)
def test_what_is_not_read_is_refused(made, tmp_path, change, words):
    with pytest.raises(ModelError, match=words):
        polyquant.load(changed_copy(made(weights="int8"), tmp_path / "out", stored=change), device="cpu")


@pytest.mark.parametrize(
    ("change", "tensors", "words"),
    [
        (None, {f"{UP}.weight_zero_point": None}, f"{UP} cannot be read: weight_zero_point is missing"),
        (
            None,
            {f"{UP}.weight_scale": torch.ones(3)},
            rf"{UP} cannot be read: weight_scale .* \(512,\) float, .* \(3,\)",
        ),
        (None, {f"{UP}.input_scale": torch.ones(1)}, f"{UP} cannot be read: input_scale has no place"),
        (None, {f"{UP}.weight_scale": None}, f"{UP}.*is int8, and there is no weight_scale beside it"),
        (None, {"model.layers.7.mlp.up_proj.weight_scale": torch.ones(1)}, "1 packed layers have no Linear module"),
        (lambda stored: weight_of(stored).update(dtype="uint4"), {}, "q_proj cannot be read: weight of a layer"),
    ],
)
def test_damaged_checkpoints_name_the_layer(made, tmp_path, change, tensors, words):
    with pytest.raises(ModelError, match=words):
        polyquant.load(changed_copy(made(weights="int8"), tmp_path / "out", put(tensors), change), device="cpu")


def test_layers_that_a_pattern_excludes(folder, tmp_path):
    out = polyquant.quantize(
        tiny_model("llama", folder), "quark", tmp_path / "plain", device="cpu", weights="fp8", skip=("down_proj",)
    )
    loaded = polyquant.load(
        changed_copy(out, tmp_path / "out", stored=lambda stored: stored.update(exclude=["*down_proj", "lm_*"]))
    )
    down = {f"model.layers.{index}.mlp.down_proj" for index in range(2)}
    assert set(loaded.config.skip) == down | {"lm_head"}
    assert_verified(loaded)
    assert polyquant.load(out).config.skip == (
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    )


def test_what_makes_no_checkpoint_is_refused(folder, tmp_path, monkeypatch):
    path, out = tiny_model("llama", folder), tmp_path / "out"
    with pytest.raises(ConfigError, match="uses no calibration text; leave calibration"):
        polyquant.quantize(path, "quark", out, calibration=["some text"], device="cpu")
    with pytest.raises(ConfigError, match=r"experts\.gate_up_proj are fused experts, and amd-quark leaves those dense"):
        polyquant.quantize(tiny_model("mixtral", folder), "quark", out, device="cpu")
    monkeypatch.setattr("polyquant.support.libraries.installed_version", lambda name: None)
    monkeypatch.setattr(polyquant.backend("quark").plugin, "library_problems", list)  # accelerate is there
    with pytest.raises(
        EnvironmentProblem, match=r"made with amd-quark:\n .* is not installed\n.*pip install 'amd-quark"
    ):
        polyquant.quantize(path, "quark", out, device="cpu")
    assert not out.exists()


ALONE = """
import contextlib, io, json, sys
import accelerate, torch, transformers
import torch._dynamo
import polyquant
from polyquant.testing.state import differences, snapshot
dense, made, out = sys.argv[1:]
polyquant.load(made, device="cpu")
loaded = "quark" in sys.modules
before, limits = snapshot(), torch._dynamo.config.save_config()
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    polyquant.quantize(dense, "quark", out, device="cpu", weights="int8")
changed = differences(before, snapshot())
print(json.dumps([loaded, changed, limits == torch._dynamo.config.save_config(), said.getvalue()]))
"""


def test_loading_needs_no_quark_and_quantizing_leaves_nothing_behind(folder, made, tmp_path):
    arguments = (str(tiny_model("llama", folder)), str(made(weights="int8")), str(tmp_path / "out"))
    loaded, changed, limits, said = run_python(ALONE, *arguments)
    assert not loaded
    assert not changed
    assert limits
    assert said == ""


def test_a_compilation_that_was_killed_is_not_waited_for(tmp_path, monkeypatch, caplog):
    """amd-quark compiles where it is first imported, and torch waits for ever for the lock of a process that is gone."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delitem(sys.modules, "quark.torch.kernel", raising=False)
    lock = Path(cpp_extension._get_build_directory(COMPILED, verbose=False)) / "lock"
    lock.touch()
    wait_for_kernels()
    assert not lock.exists()
    assert "left by a process that is gone" in caplog.text
