"""Fine-tuning: what each option of a run does, and which are refused where they cannot work. Tiny models."""

import json
import random
from types import SimpleNamespace

import polyquant
import pytest
from polyquant.errors import ConfigError, UnsupportedOperation
from polyquant.finetuning.data import read_examples
from polyquant.finetuning.options import TrainingOptions
from polyquant.testing.models import tiny_model
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("rowwise")
LINES = [
    {"prompt": f"What is {number} and {number}? ", "completion": f"It is {2 * number}, sir."} for number in range(1, 17)
]
QUICK = {"rank": 4, "batch_size": 4, "steps": 4, "learning_rate": 5e-3, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model("llama", tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES))
    return path


def tune(model, data, out, backend="rowwise", **options):
    return polyquant.finetune(model, data, out, backend=backend, device="cpu", **{**QUICK, **options})


def weights(adapter):
    return load_file(adapter / "adapter_model.safetensors")


def steps(adapter):
    header, *rows = (adapter / "steps.csv").read_text().splitlines()
    return [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]


# optimizers


def test_the_8bit_optimizer_trains_and_goes_on_on_a_cpu(bitsandbytes, model, data, tmp_path):
    options = {
        "optimizer": "adamw_8bit",
        "rank": 16,
        "steps": 4,
    }  # 16 x 256: bitsandbytes keeps smaller ones in float32
    plain = tune(model, data, tmp_path / "plain", **{**options, "optimizer": "adamw_torch"})
    seen = []

    def stop(step):
        seen.append(step.done)
        if step.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, data, tmp_path / "out", **options, progress=SimpleNamespace(step=stop))
    import torch

    saved = torch.load(tmp_path / ".out.training" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    states = [entry["__bnb_optimizer_quant_state__"]["state1"].dtype for entry in saved.values()]
    assert torch.uint8 in states
    whole = tune(model, data, tmp_path / "whole", **options)
    gone_on = tune(model, data, tmp_path / "out", **options)
    assert gone_on.resumed_from == 2
    assert gone_on.last_loss == pytest.approx(whole.last_loss, rel=1e-5)
    assert whole.last_loss == pytest.approx(plain.last_loss, rel=0.1)
    assert whole.last_loss != plain.last_loss


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paged_optimizers_are_refused_where_there_is_no_gpu(model, data, tmp_path, optimizer):
    with pytest.raises(ConfigError, match=rf"{optimizer} pages .* the model is on the cpu; use optimizer='adamw_"):
        tune(model, data, tmp_path / "out", optimizer=optimizer)
    assert not (tmp_path / ".out.training").exists()


# kinds of adapters


def test_rslora_scales_with_the_root_of_the_rank(model, data, tmp_path):
    tune(model, data, tmp_path / "out", rslora=True, rank=16, alpha=8, steps=1)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_rslora"]
    loaded = polyquant.load(model, "rowwise", device="cpu", adapter=str(tmp_path / "out"))
    scales = {module.scaling["default"] for module in loaded.model.modules() if hasattr(module, "lora_A")}
    assert scales == {8 / 16**0.5}


def test_dora_is_refused_where_peft_cannot_read_the_weights(model, data, tmp_path):
    with pytest.raises(UnsupportedOperation, match=r"DoRA .* rowwise .*q_proj.*dora=False"):
        tune(model, data, tmp_path / "out", dora=True)
    assert not (tmp_path / ".out.training").exists()


def test_dora_trains_where_peft_can(bitsandbytes, model, data, tmp_path):
    result = tune(model, data, tmp_path / "out", backend="bitsandbytes", bits=4, dora=True, steps=8)
    assert result.last_loss < result.first_loss
    magnitudes = [tensor for name, tensor in weights(tmp_path / "out").items() if "magnitude" in name]
    assert len(magnitudes) == 2 * 7
    loaded = polyquant.load(model, "bitsandbytes", device="cpu", bits=4, adapter=str(tmp_path / "out"))
    assert {layer.role for layer in loaded.layers if "lora_magnitude" in layer.name} == {"adapter"}


# data


def test_packing_makes_fewer_and_full_examples(data, model, tmp_path):
    tokenizer = polyquant.load(model, "rowwise", device="cpu").tokenizer
    apart = read_examples(data, tokenizer, TrainingOptions(), 64).examples
    packed = read_examples(data, tokenizer, TrainingOptions(packing=True), 64).examples
    assert len(packed) < len(apart)
    assert {len(example.input_ids) for example in packed[:-1]} == {64}
    assert [token for example in packed for token in example.input_ids] == [
        token for example in apart for token in example.input_ids
    ]
    result = tune(model, data, tmp_path / "out", packing=True, max_length=64, steps=8)
    assert result.last_loss < result.first_loss


def test_packing_needs_no_truncation(data, model):
    tokenizer = polyquant.load(model, "rowwise", device="cpu").tokenizer
    assert len(read_examples(data, tokenizer, TrainingOptions(packing=True), 16).examples) > len(LINES)


def test_the_name_of_a_dataset_is_looked_up(data, model, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "sums").mkdir()
    data.rename(tmp_path / "sums" / "train.jsonl")  # a folder is a dataset that needs no network
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = polyquant.load(model, "rowwise", device="cpu").tokenizer
    assert len(read_examples("sums", tokenizer, TrainingOptions(), 512).examples) == len(LINES)
    with pytest.raises(ConfigError, match=r"nobody/nothing.*dataset"):
        read_examples("nobody/nothing", tokenizer, TrainingOptions(), 512)


# the run


def test_accumulation_sees_as_many_examples_a_step(model, data, tmp_path):
    options = {"steps": 2, "dropout": 0.0, "learning_rate": 1e-3}
    at_once = tune(model, data, tmp_path / "at-once", batch_size=8, **options)
    in_parts = tune(model, data, tmp_path / "in-parts", batch_size=2, accumulation=4, **options)
    assert in_parts.last_loss == pytest.approx(at_once.last_loss, rel=1e-3)


def test_the_learning_rate_rises_and_falls_as_asked(model, data, tmp_path):
    tune(model, data, tmp_path / "out", steps=8, warmup=0.5, schedule="linear", learning_rate=1e-3)
    rates = [float(step["learning_rate"]) for step in steps(tmp_path / "out")]
    assert rates[:5] == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[5:] == pytest.approx([0.75e-3, 0.5e-3, 0.25e-3])


def test_the_seed_decides_everything(model, data, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        tune(model, data, tmp_path / name, seed=seed, dropout=0.1, steps=2)
    assert all(
        (tensor == weights(tmp_path / "again")[name]).all() for name, tensor in weights(tmp_path / "one").items()
    )
    assert any((tensor != weights(tmp_path / "two")[name]).any() for name, tensor in weights(tmp_path / "one").items())


def test_a_run_stops_early_and_keeps_the_best_adapter(model, data, tmp_path):
    letters = random.Random(0)  # nothing in them helps with those held out, so learning them by heart shows soon
    lines = [
        {"prompt": f"Word {number}: ", "completion": "".join(letters.choices("abcdefgh", k=12))} for number in range(16)
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    result = tune(
        model, data, tmp_path / "out", steps=60, evaluation=0.25, patience=2, rank=16, learning_rate=2e-3,
        schedule="constant", warmup=0.0,
    )  # fmt: skip
    assert result.steps < 60
    held_out = [float(step["evaluation_loss"]) for step in steps(tmp_path / "out") if step["evaluation_loss"]]
    assert min(held_out) not in held_out[-2:], "it stopped before two evaluations without a lower loss"
    assert result.evaluation_loss == min(held_out)
    assert any("where the held-out loss was lowest" in note for note in result.notes)
    assert evaluation_loss(model, data, tmp_path / "out") == pytest.approx(min(held_out), rel=1e-3)


def test_evaluations_before_an_interruption_are_not_forgotten(model, data, tmp_path):
    def stop(step):
        if step.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, data, tmp_path / "out", steps=6, evaluation=0.25, progress=SimpleNamespace(step=stop))
    tune(model, data, tmp_path / "out", steps=6, evaluation=0.25)
    assert [step["step"] for step in steps(tmp_path / "out") if step["evaluation_loss"]] == ["2", "4", "6"]


def evaluation_loss(model, data, adapter):
    """The loss of the adapter on disk on what its run held out."""
    import torch
    from polyquant.finetuning.run import split

    loaded = polyquant.load(model, "rowwise", device="cpu", adapter=str(adapter))
    _, held_out = split(read_examples(data, loaded.tokenizer, TrainingOptions(), 512).examples, 0.25, seed=0)
    total, count = 0.0, 0
    for example in held_out:
        labels = torch.tensor(example.labels[1:])
        loss = torch.nn.functional.cross_entropy(loaded.logits(example.input_ids)[:-1], labels, reduction="sum")
        total, count = total + float(loss), count + int((labels != -100).sum())
    return total / count


def test_tensorboard_reads_the_logs(model, data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tune(model, data, tmp_path / "out")
    (folder,) = {path.parent for path in (tmp_path / "out" / "runs").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses[-1] == pytest.approx(result.last_loss, rel=1e-3)
    assert len(losses) == result.steps


def test_reports_say_what_a_terminal_shows(model, data, tmp_path):
    said = []
    tune(model, data, tmp_path / "out", progress=SimpleNamespace(step=said.append))
    assert [step.done for step in said] == [1, 2, 3, 4]
    assert all(step.of == 4 and step.tokens_per_second > 0 and step.memory_bytes > 2**20 for step in said)
    assert said[0].seconds_left > said[-1].seconds_left == 0


def test_nothing_of_the_process_is_left_changed(model, data, tmp_path):
    from polyquant.testing.state import differences, snapshot

    tune(model, data, tmp_path / "first", steps=1)  # what the libraries set when they are first used
    before = snapshot()
    tune(model, data, tmp_path / "second", steps=1)
    changed = differences(before, snapshot())
    assert not [what for what in changed if "random" not in what], "transformers seeds, and the seed is an option"


def test_a_loaded_model_is_the_bare_base_again_after_an_interrupted_run(model, data, tmp_path):
    loaded = polyquant.load(model, "rowwise", device="cpu")
    before = loaded.logits([5, 6, 7])

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        polyquant.finetune(loaded, data, tmp_path / "out", **QUICK, progress=SimpleNamespace(step=stop))
    assert (loaded.logits([5, 6, 7]) == before).all()
    assert not any("lora" in name for name, _ in loaded.model.named_modules())
    polyquant.finetune(loaded, data, tmp_path / "out", **QUICK)
    with pytest.raises(ConfigError, match="carries the adapter .*out already"):
        polyquant.finetune(loaded, data, tmp_path / "again", **QUICK)
