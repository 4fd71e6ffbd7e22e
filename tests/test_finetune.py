"""Fine-tuning on tiny models with the reference backend: data, targets, runs that go on, adapters, merging."""

import json
import os
import subprocess
from types import SimpleNamespace

import polyquant
import pytest
import torch
from polyquant.errors import (
    AdapterError,
    ConfigError,
    MergeRefused,
    SaveError,
    TrainingConflict,
    TrainingDiverged,
    UnsupportedOperation,
)
from polyquant.finetuning import state
from polyquant.finetuning.data import IGNORED, Example, pack, read_examples
from polyquant.finetuning.options import TrainingOptions
from polyquant.finetuning.run import split
from polyquant.testing import warm
from polyquant.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("rowwise")
LINES = [
    {"prompt": f"What is {number} and {number}? ", "completion": f"It is {2 * number}, sir."} for number in range(1, 17)
]
QUICK = {"rank": 4, "batch_size": 4, "steps": 6, "learning_rate": 5e-3, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model("llama", tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def base(model):
    return polyquant.load(model, "rowwise", device="cpu", bits=8)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES))
    return path


def tune(model, data, out, **options):
    return polyquant.finetune(model, data, out, backend="rowwise", device="cpu", bits=8, **{**QUICK, **options})


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "train.jsonl").write_text("\n".join(json.dumps(line) for line in LINES))
    steps = []
    result = tune(
        model,
        folder / "train.jsonl",
        folder / "adapter",
        steps=30,
        evaluation=0.2,
        progress=SimpleNamespace(step=steps.append),
    )
    return result, folder / "adapter", steps


# data


def read(data, base, **options):
    return read_examples(data, base.tokenizer, TrainingOptions(**options), 512)


def test_only_completions_are_learned_unless_asked(data, base):
    example = read(data, base).examples[0]
    prompt = base.tokenizer(LINES[0]["prompt"]).input_ids
    assert example.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert example.labels[len(prompt) :] == example.input_ids[len(prompt) :]
    assert example.input_ids[-1] == base.tokenizer.eos_token_id
    assert IGNORED not in read(data, base, completion_only=False).examples[0].labels


def test_of_a_chat_what_the_assistant_says_is_learned(tmp_path, base):
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": said}))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    with pytest.raises(ConfigError, match="line 1: it has messages, and the model has no chat template"):
        read(tmp_path / "chat.jsonl", base)
    base.tokenizer.chat_template = template
    try:
        (example,) = read(tmp_path / "chat.jsonl", base).examples
    finally:
        base.tokenizer.chat_template = None
    learned = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    assert base.tokenizer.decode(learned) == "two;four;"


def test_plain_text_is_an_example_a_paragraph(tmp_path, base):
    (tmp_path / "text.txt").write_text("One paragraph.\n\nAnother one.\n")
    assert len(read(tmp_path / "text.txt", base).examples) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no examples"),
        ('{"text": "a"}\n{"text": ', "line 2 is no JSON"),
        ('{"text": "good"}\n\n[1, 2]', "line 3 holds list"),
        ('{"question": "a", "answer": "b"}', "line 1: it has 'question', 'answer'; 'text', 'prompt' with"),
        ('{"prompt": "a", "completion": ""}', "line 1: 'completion' must be text that is not empty"),
        ('{"prompt": "a", "completion": 3}', "line 1: 'completion' must be text"),
        ('{"messages": [{"role": "user"}]}', "line 1"),
    ],
)
def test_bad_records_are_named_with_line_and_reason(tmp_path, base, content, said):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=said):
        read(tmp_path / "bad.jsonl", base)


def test_text_that_is_not_utf8_is_refused(tmp_path, base):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ConfigError, match="not UTF-8"):
        read(tmp_path / "bad.jsonl", base)
    with pytest.raises(ConfigError, match="no such file"):
        read(tmp_path / "nowhere.jsonl", base)


def test_long_examples_are_counted_and_cut_only_when_asked(data, base):
    length = max(len(example.input_ids) for example in read(data, base).examples)
    with pytest.raises(ConfigError, match=rf"of 16 examples have more than {length - 1} tokens.*--truncate"):
        read_examples(data, base.tokenizer, TrainingOptions(), length - 1)
    cut = read_examples(data, base.tokenizer, TrainingOptions(truncate=True), length - 1)
    assert max(len(example.input_ids) for example in cut.examples) == length - 1
    assert "were cut" in cut.notes[0]


def test_packing_fills_windows_and_forgets_no_token():
    packed = pack([Example([1, 2, 3], [1, 2, 3]), Example([4, 5], [IGNORED, 5]), Example([6, 7, 8], [6, 7, 8])], 4)
    assert [example.input_ids for example in packed] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert [example.labels for example in packed] == [[IGNORED, 2, 3, IGNORED], [5, IGNORED, 7, 8]]


def test_a_split_holds_out_what_is_asked_and_always_leaves_some():
    examples = [Example([number], [number]) for number in range(10)]
    learned, held_out = split(examples, 0.3, seed=1)
    assert (len(learned), len(held_out)) == (7, 3)
    assert sorted(learned + held_out) == examples
    assert len(split(examples[:2], 0.9, seed=1)[0]) == 1


# targets and options


def test_targets_that_match_nothing_are_refused(model, data, tmp_path):
    with pytest.raises(ConfigError, match="'q_prog' matches no linear layer.*Did you mean 'q_proj'"):
        tune(model, data, tmp_path / "out", targets=("q_prog",))
    assert not (tmp_path / "out").exists()


def test_wrong_options_are_refused_before_anything_loads(data, tmp_path):
    with pytest.raises(ConfigError, match="patience needs examples to evaluate on"):
        tune("no/model", data, tmp_path / "out", patience=3)
    with pytest.raises(ConfigError, match="optimizer must be"):
        tune("no/model", data, tmp_path / "out", optimizer="sgd")


def test_a_backend_that_cannot_train_says_so_before_anything_loads(data, tmp_path):
    with pytest.raises(UnsupportedOperation, match="gguf cannot train adapters"):
        polyquant.finetune("no/model", data, tmp_path / "out", backend="gguf")


# a run


def test_a_run_lowers_the_loss_and_leaves_a_plain_peft_folder(tuned):
    result, adapter, steps = tuned
    assert result.last_loss < result.first_loss / 2
    assert [step.done for step in steps if step.evaluation_loss is None] == list(range(1, 31))
    assert result.evaluation_loss is not None
    assert {"adapter_model.safetensors", "adapter_config.json", "polyquant.json", "steps.csv", "loss.svg", "runs",
            "README.md"} <= {path.name for path in adapter.iterdir()}  # fmt: skip
    assert (adapter / "steps.csv").read_text().count("\n") == 31
    assert "<svg" in (adapter / "loss.svg").read_text()
    assert list((adapter / "runs").rglob("events.out.tfevents.*"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    card = json.loads((adapter / "polyquant.json").read_text())
    assert (card["backend"], card["architecture"], len(card["base_hash"])) == ("rowwise", "LlamaForCausalLM", 64)
    assert not state.working_folder(adapter).exists()


def test_the_adapter_gives_the_same_logits_through_peft_alone(tuned, model):
    import peft

    _, adapter, _ = tuned
    tokens = [5, 6, 7, 8]
    ours = polyquant.load(model, "rowwise", device="cpu", bits=8, adapter=str(adapter))
    plain = polyquant.load(model, "rowwise", device="cpu", bits=8)
    before = plain.logits(tokens)
    plain.model = peft.PeftModel.from_pretrained(plain.model, adapter).eval()
    assert torch.equal(ours.logits(tokens), plain.logits(tokens))
    assert not torch.equal(ours.logits(tokens), before)
    assert ours.generate("What is 3 and 3? ", max_new_tokens=4, do_sample=False)


def test_a_model_with_an_adapter_is_still_verified(tuned, model):
    loaded = polyquant.load(model, "rowwise", device="cpu", bits=8, adapter=str(tuned[1]))
    report = polyquant.verify(loaded)
    assert report.passed, report.failures
    adapters = [layer for layer in report.layers if layer.role == "adapter"]
    assert len(adapters) == 2 * 7 * 2
    assert all("base_layer" not in layer.name for layer in report.layers)


def test_training_leaves_the_base_as_it_was(model, data, tmp_path):
    loaded = polyquant.load(model, "rowwise", device="cpu", bits=8)
    before = loaded.logits([5, 6, 7])
    polyquant.finetune(loaded, data, tmp_path / "out", **QUICK)
    assert loaded.adapter == str(tmp_path / "out")
    with loaded.model.disable_adapter():
        assert torch.equal(loaded.logits([5, 6, 7]), before)
    assert not torch.equal(loaded.logits([5, 6, 7]), before)


def test_the_folder_is_not_overwritten_unless_asked(model, data, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SaveError, match="exists"):
        tune(model, data, tmp_path / "out")


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(model, data, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"the loss is .* at step \d+; the last good checkpoint is kept"):
        tune(model, data, tmp_path / "out", learning_rate=1e30, gradient_clip=1e30, steps=8, warmup=0, dropout=0)
    assert not (tmp_path / "out").exists()


KILLED = """
import os, sys, polyquant
from types import SimpleNamespace
def report(step):
    if step.done == int(sys.argv[4]):
        os._exit(9)
polyquant.finetune(sys.argv[1], sys.argv[2], sys.argv[3], backend="rowwise", device="cpu", bits=8, progress=SimpleNamespace(step=report), **{QUICK})
"""


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(model, data, tmp_path, rowwise):
    options = {**QUICK, "dropout": 0.1, "steps": 8}
    whole = tune(model, data, tmp_path / "whole", **options)
    for killed_at in ("3", "7"):
        code = KILLED.replace("{QUICK}", repr(options))
        command = [warm.interpreter(), "-c", code, model, str(data), str(tmp_path / "out"), killed_at]
        environment = {**os.environ, "PYTHONPATH": rowwise}
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert ended.returncode == 9, ended.stderr
    assert not (tmp_path / "out").exists()
    folder = state.working_folder(tmp_path / "out")
    (folder / "checkpoint-6" / "trainer_state.json").unlink()  # as if killed while it was written
    with pytest.raises(TrainingConflict, match=r"learning_rate: unfinished run 0.005, now 0.1"):
        tune(model, data, tmp_path / "out", **{**options, "learning_rate": 0.1})
    result = tune(model, data, tmp_path / "out", **options)
    assert result.resumed_from == 4
    assert any("checkpoint-6 was half written" in note for note in result.notes)
    assert result.last_loss == pytest.approx(whole.last_loss, rel=1e-5)
    assert result.steps == 8


def test_two_processes_share_the_steps_and_write_one_adapter(model, data, tmp_path, rowwise):
    out = tmp_path / "out"
    options = ["--rank", "4", "--batch-size", "2", "--steps", "3", "--checkpoint-every", "2"]
    launch = [warm.interpreter(), "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    command = [*launch, "-m", "polyquant", "finetune", model, "--backend", "rowwise", "--device", "cpu", *options,
               "--data", str(data), "--out", str(out), "--json"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": rowwise, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout)["adapter"] == str(out), "something else was printed"
    assert (out / "adapter_model.safetensors").exists()
    assert (out / "steps.csv").read_text().count("\n") == 4
    assert polyquant.load(model, "rowwise", device="cpu", bits=8, adapter=str(out)).adapter == str(out)


# adapters that do not fit


def test_what_is_no_adapter_is_refused(model, tmp_path):
    with pytest.raises(AdapterError, match="is no adapter: adapter_config.json"):
        polyquant.load(model, "rowwise", device="cpu", adapter=str(tmp_path))


def test_an_adapter_of_another_architecture_or_size_is_refused(tuned, tmp_path):
    _, adapter, _ = tuned
    for other, said in (("qwen2", "trained on a LlamaForCausalLM, and this model is a Qwen2ForCausalLM"),
                        ("odd", r"it adapts .* with 512 inputs, and the module has 203")):  # fmt: skip
        with pytest.raises(AdapterError, match=said):
            polyquant.load(tiny_model(other, tmp_path), "rowwise", device="cpu", adapter=str(adapter))


def test_on_other_options_it_loads_and_says_so(tuned, model):
    loaded = polyquant.load(model, "rowwise", device="cpu", scale_dtype="bfloat16", adapter=str(tuned[1]))
    assert any("other options of this backend" in note for note in loaded.notes)


# merging


def test_merging_into_the_dequantized_base_changes_nothing(tuned, model, tmp_path):
    quality = polyquant.merge(
        model, tuned[1], tmp_path / "merged", "dequantized", device="cpu", compute_dtype="float32"
    )
    assert quality.kl_mean < 1e-5
    assert quality.top1 > 0.99
    from polyquant.loading import dense
    from polyquant.models.resolve import resolve

    merged = dense.load_dense(resolve(tmp_path / "merged"))
    with_adapter = polyquant.load(model, "rowwise", device="cpu", compute_dtype="float32", adapter=str(tuned[1]))
    with torch.inference_mode():
        logits = merged(torch.tensor([[5, 6, 7]])).logits[0]
    assert torch.allclose(logits, with_adapter.logits([5, 6, 7]), atol=1e-3)


def test_a_merge_that_is_too_far_is_refused_and_forced(tuned, model, tmp_path):
    with pytest.raises(MergeRefused, match=r"KL.*0.0 is allowed. Nothing was written.*--into dequantized"):
        polyquant.merge(model, tuned[1], tmp_path / "merged", "dense", device="cpu", threshold=0.0)
    assert not (tmp_path / "merged").exists()
    quality = polyquant.merge(model, tuned[1], tmp_path / "merged", "dense", device="cpu", threshold=0.0, force=True)
    assert quality.kl_mean > 0
    assert (tmp_path / "merged" / "config.json").exists()


def test_merging_and_quantizing_again_gives_a_quantized_checkpoint(tuned, model, tmp_path):
    polyquant.merge(model, tuned[1], tmp_path / "merged", "requantized", device="cpu", threshold=1.0)
    again = polyquant.load(tmp_path / "merged", device="cpu")
    assert again.backend.name == "rowwise"
    assert polyquant.verify(again).passed
