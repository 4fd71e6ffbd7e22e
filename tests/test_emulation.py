"""Emulated activations: which loads have them, what says so, and what is refused."""

import json

import polyquant
import pytest
import torch
from polyquant.registry.installed import registry
from polyquant.comparison.candidates import parse, with_emulation
from polyquant.comparison.report.rows import plain_rows
from polyquant.errors import ConfigError, PolyquantError
from polyquant.plugin import Activations, activation_formats
from polyquant.plugin.activations import rounded
from polyquant.testing.models import tiny_model

FORMATS = [value for value in vars(activation_formats).values() if isinstance(value, Activations)]
NAMED = "nvfp4:nvfp4,emulate_activations=true"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("tiny"))


def read(text):
    return parse(text, registry().info)


@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_rounding_keeps_shape_and_dtype_and_what_has_codes(how, shape):
    values = torch.randn(*shape, 90, generator=torch.Generator().manual_seed(0))  # no whole blocks
    once = rounded(values, how)
    assert (once.shape, once.dtype) == (values.shape, values.dtype)
    assert 0 < float((once - values).abs().max()) <= float(values.abs().max()) / 4
    assert rounded(values.bfloat16(), how).dtype == torch.bfloat16
    assert torch.equal(rounded(torch.zeros_like(values), how), torch.zeros_like(values))
    assert rounded(values[..., :0], how).numel() == 0
    assert torch.equal(rounded(-values, how), -once) or how.codes == "int8"  # -128 has no opposite


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_gradients_pass_as_if_nothing_was_rounded(how):
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (rounded(values, how) * torch.arange(64.0)).sum().backward()
    assert torch.equal(values.grad, torch.arange(64.0).expand(3, 64))


def test_numbers_of_each_format():
    values = torch.tensor([[448.0, 1.0, -0.3, 240.0, *[0.0] * 28]])
    assert rounded(values, activation_formats.MXFP8)[0, :4].tolist() == [448, 1, -0.3125, 240]
    assert rounded(values / 448 * 6, activation_formats.MXFP4)[0, :4].tolist() == [6, 0, -0.0, 3]
    assert rounded(values / 448 * 127.5, activation_formats.INT8)[0, :4].tolist() == [127, 0, -0.0, 68]
    assert rounded(values, activation_formats.FP8, torch.tensor(2.0))[0, :4].tolist() == [448, 1, -0.3125, 240]


@pytest.mark.parametrize(
    ("backend", "options", "words"),
    [
        ("bitsandbytes", {}, "the kernels of bitsandbytes's format.* multiply with activations as they are"),
        ("hqq", {}, "or take a format that rounds them, of .*nvfp4"),
        ("torchao", {"weights": "int8", "dynamic_activations": True}, "rounds activations itself"),
        ("fp8", {"experts": "quantize"}, "experts='quantize' multiplies in polyquant's packed layout"),
    ],
)
def test_where_nothing_is_rounded_it_is_refused_before_any_file_is_read(backend, options, words, tmp_path):
    with pytest.raises(PolyquantError, match=words):
        polyquant.load(tiny_model("llama", tmp_path), backend, device="cpu", emulate_activations=True, **options)


def test_what_stores_or_plans_a_model_knows_none(model, tmp_path, run_python):
    with pytest.raises(ConfigError, match=r"leave it out where you quantize, .*\(run, verify, compare\)"):
        polyquant.quantize(model, "nvfp4", tmp_path / "out", emulate_activations=True)
    with pytest.raises(ConfigError, match="leave it out where you search"):
        polyquant.search(model, memory="1GiB", backend="modelopt", emulate_activations=True)
    ended = run_python("plan", str(model), "-b", "nvfp4", "--emulate-activations")
    assert ended.returncode
    assert "leave it out where you plan" in ended.stderr


def test_a_candidate_says_that_it_is_emulated():
    given = read(NAMED)
    assert (given.options, given.emulated, given.label) == ({"emulate_activations": True}, True, NAMED)
    assert with_emulation(read("nvfp4")) == given
    assert with_emulation(given) is given
    assert with_emulation(read("dense")) == read("dense")
    assert read("nvfp4:nvfp4,emulate_activations=false").options == {}
    checkpoint = with_emulation(read("folder/made"))
    assert (checkpoint.name, checkpoint.label) == ("folder/made", "folder/made (activations emulated)")
    for text, words in (
        ("dense:float32,emulate_activations=true", "the dense model rounds no activations"),
        ("nvfp4:nvfp4,emulate_activations=yes", "emulate_activations is true or false, got 'yes'"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(text)


def test_every_figure_of_a_comparison_says_so(model, tmp_path, monkeypatch, warm_children):
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path / "cache"))
    run = polyquant.compare(
        str(model), ["nvfp4", "bitsandbytes:nf4"], out=tmp_path / "out", parts=("quality",), device="cpu", windows=1,
        emulate_activations=True,
    )  # fmt: skip
    plain = polyquant.compare(
        str(model), ["nvfp4"], out=tmp_path / "out", parts=("quality",), device="cpu", windows=1
    )  # fmt: skip
    emulated, refused = plain_rows(run)
    assert (emulated["candidate"], emulated["emulated_activations"]) == (NAMED, "nvfp4")
    assert refused["status"] == "failed"
    assert "so there is no rounding to emulate" in refused["reason"]
    assert emulated["kl_mean"] > plain_rows(plain)[0]["kl_mean"] > 0
    assert any(note.startswith(f"activations of {NAMED}, ") and "speed is not" in note for note in run.notes)
    assert not plain.notes
    page = run.report(tmp_path / "report.html").read_text()
    assert NAMED in page
    assert "activations emulated" in page
    for suffix in ("json", "csv", "md"):
        assert "emulate_activations=true" in (tmp_path / f"report.{suffix}").read_text().replace("\\", "")
    assert "emulated_activations" in (tmp_path / "report.csv").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["emulated_activations"] == "nvfp4"


def test_the_command_shows_it(model, run_python):
    ended = run_python("verify", str(model), "-b", "nvfp4", "--device", "cpu", "--emulate-activations", "--json")
    report = json.loads(ended.stdout)
    assert report["emulated_activations"] == "nvfp4"
    assert report["kernel"].endswith("activations rounded to nvfp4 in software (emulated)")
    shown = run_python("verify", str(model), "-b", "nvfp4", "--device", "cpu", "--emulate-activations").stdout
    assert "nvfp4, emulated: speed and memory are not the format's" in " ".join(shown.split())
