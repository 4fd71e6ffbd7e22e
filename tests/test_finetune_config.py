"""`polyquant finetune --config`: a file of options by polyquant's names or TRL's, flags before it, and what comes after."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import transformers
from polyquant.cli.training_file import TRL, Arguments, read_training_file
from polyquant.errors import ConfigError
from polyquant.finetuning.options import TrainingOptions
from polyquant.loading.options import LoadOptions
from polyquant.testing import tiny_model, warm

ROOT = Path(__file__).parent.parent
KNOWN = {
    *Arguments.__struct_fields__,
    *TrainingOptions.__struct_fields__,
    *LoadOptions.__struct_fields__,
    "bits",
    "quant_type",
}
YAML = """
model_name_or_path: {model}
backend: bitsandbytes
bits: 4
quant_type: nf4
dataset_name: train.jsonl
output_dir: adapter
max_steps: 2
learning_rate: 1e-3
lora_r: 4
lora_target_modules: [q_proj, v_proj]
"""
ELSEWHERE = {
    "model_name_or_path", "model_revision", "attn_implementation", "dataset_name", "max_seq_length",
    "completion_only_loss", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora",
    "overwrite_output_dir", "warmup_ratio",
}  # fmt: skip
"""Names that TRL's own records have, and those that transformers had before 5."""


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama", tmp_path)
    lines = [{"text": f"the {animal} sat on the mat"} for animal in ("cat", "dog", "cow", "hen") * 3]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "train.yaml").write_text(YAML.format(model="llama"))
    return tmp_path


def polyquant(folder, *words):
    return warm.run(["-m", "polyquant", *words], seconds=300, folder=folder)


def test_a_file_trains_flags_win_and_the_command_that_is_printed_runs(folder):
    said = polyquant(folder, "finetune", "--config", "train.yaml", "--rank", "8", "--device", "cpu")
    assert said.returncode == 0, said.stderr
    assert "--rank takes the place of lora_r in train.yaml" in said.stderr
    written = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert written["r"] == 8
    assert {name.rpartition(".")[2] for name in written["target_modules"]} == {"q_proj", "v_proj"}
    (line,) = (line for line in said.stdout.splitlines() if line.startswith("use it: "))
    program, *words = shlex.split(line.removeprefix("use it: "))
    assert program == "polyquant"
    assert {"--bits", "--quant-type", "--adapter"} <= set(words)
    again = polyquant(folder, *words, "--max-new-tokens", "2")
    assert again.returncode == 0, again.stderr
    assert again.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("learning_rat: 1", r"train.yaml has 'learning_rat', which is no option; .* Did you mean 'learning_rate'\?"),
        ("rank: 4\nlora_r: 4", "train.yaml has rank and lora_r, which are one option: leave one out"),
        ("- rank", "train.yaml must hold options with their values, as in `rank: 16`; it holds list"),
        ("rank: [", "train.yaml is no YAML: "),
        ("rank: 4", "no model is given: MODEL, or model in train.yaml"),
        ("model: llama\ndata: train.jsonl", "no out is given: --out DIR, or out in train.yaml"),
        ("model: llama\ndata: train.jsonl\nout: o\nrank: many", "rank.*many|many.*rank|int.*rank"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_before_anything_loads(folder, content, said):
    (folder / "train.yaml").write_text(content)
    result = polyquant(folder, "finetune", "--config", "train.yaml")
    assert result.returncode == 2, result.stderr
    with pytest.raises(ConfigError, match=said):
        raise ConfigError(" ".join(result.stderr.split()))


def test_yaml_json_and_toml_say_the_same(tmp_path):
    wanted = {"rank": 8, "learning_rate": 0.001, "targets": ["q_proj"]}
    texts = {
        "yaml": "lora_r: 8\nlearning_rate: 0.001\nlora_target_modules: [q_proj]\nmax_steps: -1",
        "json": '{"lora_r": 8, "learning_rate": 0.001, "lora_target_modules": ["q_proj"]}',
        "toml": 'rank = 8\nlearning-rate = 0.001\ntargets = ["q_proj"]',
    }
    for kind, text in texts.items():
        (tmp_path / f"train.{kind}").write_text(text)
        assert read_training_file(tmp_path / f"train.{kind}", KNOWN)[0] == wanted
    (tmp_path / "train.ini").write_text("rank=8")
    with pytest.raises(ConfigError, match=r"ends in \.yaml, \.json or \.toml, got \.ini"):
        read_training_file(tmp_path / "train.ini", KNOWN)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_training_file(tmp_path / "none.yaml", KNOWN)


def test_the_file_that_the_page_shows_is_the_one_that_is_run():
    page = (ROOT / "docs" / "how-to" / "finetune.md").read_text()
    assert f"```yaml\n{(ROOT / 'docs' / 'examples' / 'train.yaml').read_text()}```" in page


def test_a_truth_in_quotes_is_read_as_what_it_says(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "mine").write_text("kept")
    (folder / "train.yaml").write_text(YAML.format(model="llama") + "overwrite: 'false'\n")
    said = polyquant(folder, "finetune", "--config", "train.yaml")
    assert said.returncode != 0
    assert "adapter" in said.stderr
    (folder / "train.yaml").write_text("model: llama\ndata: train.jsonl\nout: o\noverwrite: perhaps")
    assert "overwrite" in polyquant(folder, "finetune", "--config", "train.yaml").stderr
    assert (folder / "adapter" / "mine").read_text() == "kept"


def test_names_are_those_of_transformers_and_of_this_project():
    theirs = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert TRL.keys() - theirs <= ELSEWHERE
    assert set(TRL.values()) <= KNOWN
