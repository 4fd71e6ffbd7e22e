"""`polyquant search` on a real tiny model: in the budget, closer than uniform types, written, made again, gone on with."""

import json
import re
import shlex

import polyquant
import pytest
import torch
from polyquant.cli.build import build
from polyquant.errors import CheckpointConflict, ConfigError
from polyquant.testing.models import tiny_model
from typer.testing import CliRunner

FORMATS = ("Q4_0", "Q5_0", "Q8_0")
BUDGET = 940_000  # bytes: between Q5_0 for everything (883,968) and Q8_0 (1,363,200)


class Steps:
    """Keeps what it sees; raises at the step of that number."""

    def __init__(self, stop: int = 10**9) -> None:
        self.seen, self.stop = [], stop

    def step(self, step) -> None:
        self.seen.append(str(step))
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    return tiny_model("llama-tied", tmp_path)


def test_it_is_in_the_budget_closer_than_uniform_types_and_written(model, tmp_path):
    found = polyquant.search(model, BUDGET, formats=FORMATS, windows=1, out=tmp_path / "out")
    assert found.stored_bytes <= BUDGET
    fitting = {each.format: each.quality.kl_mean for each in found.uniform if each.fits}
    assert set(fitting) == {"Q4_0", "Q5_0"}
    assert found.quality.kl_mean < min(fitting.values())
    assert found.quality.kl_mean == pytest.approx(found.kl_predicted, rel=0.5)
    loaded = polyquant.load(found.checkpoint)
    assert sum(layer.stored_bytes for layer in loaded.layers) == found.stored_bytes
    schemes = {layer.name.removesuffix(".weight"): layer.scheme for layer in loaded.layers if layer.quantized}
    assert schemes == {name: part.format for part in found.assigned for name in part.modules}
    again = polyquant.load(model, "gguf", **found.options)
    assert torch.equal(again.logits([5, 6, 7]), loaded.logits([5, 6, 7]))


@pytest.mark.parametrize("kernel", ["auto", "library", "packed"])
def test_bytes_are_those_of_one_kernel(model, monkeypatch, kernel):
    """Packed, a Q5_0 takes as much as a Q8_0; of one format for everything auto would take the library, of others not."""
    monkeypatch.setenv("POLYQUANT_KERNEL", "auto")
    options = {} if kernel == "auto" else {"kernel": kernel}
    budget = 1_300_000 if kernel == "packed" else BUDGET
    found = polyquant.search(model, budget, formats=FORMATS, windows=1, **options)
    loaded = polyquant.load(model, "gguf", **{"kernel": "library", **found.options})
    assert sum(layer.stored_bytes for layer in loaded.layers) == found.stored_bytes <= budget
    sizes = {each.format: each.stored_bytes for each in found.uniform}
    assert (sizes["Q5_0"] > 0.9 * sizes["Q8_0"]) is (kernel == "packed")


def test_its_command_makes_it_again(model, tmp_path):
    found = polyquant.search(model, BUDGET, formats=FORMATS, windows=1)
    words = shlex.split(found.command)
    assert words[:2] == ["polyquant", "quantize"]
    result = CliRunner().invoke(build("gguf"), [*words[1:-1], str(tmp_path / "made")])
    assert result.exit_code == 0, result.output
    made = polyquant.load(tmp_path / "made")
    assert sum(layer.stored_bytes for layer in made.layers) == found.stored_bytes


def test_an_interrupted_search_goes_on_and_another_budget_measures_nothing_anew(model):
    with pytest.raises(KeyboardInterrupt):
        polyquant.search(model, BUDGET, formats=FORMATS, windows=1, progress=Steps(stop=10))
    steps = Steps()
    found = polyquant.search(model, BUDGET, formats=FORMATS, windows=1, progress=steps)
    parts = [step for step in steps.seen if "Q4_0 in one part at a time" in step]
    assert 0 < len(parts) < len(found.assigned)
    assert sum("Q8_0 in one part at a time" in step for step in steps.seen) == len(found.assigned)
    steps = Steps()
    larger = polyquant.search(model, BUDGET + 200_000, formats=FORMATS, windows=1, progress=steps)
    assert not [step for step in steps.seen if "one part" in step]
    assert larger.quality.kl_mean < found.quality.kl_mean


def test_modules_that_are_named_or_skipped_stay_as_they_are(model):
    found = polyquant.search(
        model, "2.2MB", formats=("Q4_0", "Q8_0"), by="layer", windows=1, layers={"embed_tokens": "Q5_1"},
        skip=("layers.0.mlp",),
    )  # fmt: skip
    searched = {name for part in found.assigned for name in part.modules}
    assert len(searched) == 11
    assert not {name for name in searched if "embed" in name or "layers.0.mlp" in name}
    loaded = polyquant.load(model, "gguf", **found.options)
    schemes = {layer.name: layer.scheme for layer in loaded.layers}
    assert schemes["model.embed_tokens.weight"] == "Q5_1"
    assert schemes["model.layers.0.mlp.up_proj.weight"] == "float32"


def test_a_type_whose_blocks_do_not_fit_is_left_out_or_refused(tmp_path):
    odd = tiny_model("odd", tmp_path)
    with pytest.raises(
        ConfigError, match=r"no format of gguf fits .*odd: Q4_0 is not tried: Q4_0 blocks of 32 weights"
    ):
        polyquant.search(odd, "1MiB")
    with pytest.raises(ConfigError, match="TQ1_0 blocks of 256 weights do not divide"):
        polyquant.search(odd, "1MiB", formats=("TQ1_0",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": "10KiB"}, "10.0 KiB is too little: with the smallest of Q4_0, Q8_0 everywhere .* 707.2 KiB (724224 bytes)"),
        ({"formats": ("Q4", "Q8_0")}, "no format 'Q4' of gguf's; there are Q4_0, Q4_1,"),
        ({"type": "Q4_0"}, "a search chooses type: say what is tried with formats"),
        ({"layers": {"nix_proj": "Q8_0"}}, "layers pattern 'nix_proj' matches no module"),
        ({"tokens": 3}, "tokens"),
        ({"adapter": "x"}, "leave adapter out"),
    ],
)  # fmt: skip
def test_wrong_use_is_refused_before_anything_is_loaded(model, arguments, message):
    steps = Steps()
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(ConfigError, match=pattern):
        polyquant.search(model, **{"memory": "1MiB", "formats": ("Q4_0", "Q8_0"), "progress": steps, **arguments})
    assert not steps.seen


def test_a_quantized_checkpoint_is_refused(model, tmp_path):
    out = polyquant.load(model, "gguf").save(tmp_path / "out")
    with pytest.raises(CheckpointConflict, match="is quantized already; a search needs the dense model"):
        polyquant.search(out, "1MiB")


def test_the_command_prints_a_table_or_json(model):
    words = ["search", str(model), "--memory", str(BUDGET), "--formats", "Q4_0,Q8_0", "--windows", "1"]
    shown = CliRunner().invoke(build(None), words)
    assert shown.exit_code == 0, shown.output
    assert re.search(r"found +9\d\d\.\d KiB", shown.stdout)
    assert "make it: polyquant quantize" in shown.stdout
    told = json.loads(CliRunner().invoke(build(None), [*words, "--json"]).stdout)
    assert told["stored_bytes"] <= BUDGET == told["memory_bytes"]
