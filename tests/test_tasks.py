"""Task accuracy through lm-eval, from a local task folder and files: nothing is fetched."""

import json
import math
from types import SimpleNamespace

import polyquant
import pytest
import torch
from polyquant.comparison.records import Job
from polyquant.errors import ConfigError
from polyquant.testing.models import tiny_model

pytest.importorskip("lm_eval")
from polyquant.comparison.cell.tasks import continued, likelihood, measure_tasks  # noqa: E402  it needs lm-eval

pytestmark = [
    pytest.mark.usefixtures("rowwise"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # lm-eval's own imports
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
metric_list:
  - metric: {metric}
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    model = tiny_model("llama", tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield polyquant.load(model, "rowwise", device="cpu")


@pytest.fixture
def folder(tmp_path):
    """A task with choices and one that generates, on four questions."""
    rows = [{"question": f"The {word} is", "choices": [" here", " there", " gone"], "answer": number % 3}
            for number, word in enumerate(("dog", "cat", "house", "road"))]  # fmt: skip
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    choice = TASK.format(name="choosing", data=data, kind="multiple_choice", target="answer", metric="acc",
                         more='doc_to_choice: "{{choices}}"')  # fmt: skip
    write = TASK.format(name="writing", data=data, kind="generate_until", target='"{{choices[answer]}}"',
                        metric="exact_match", more="generation_kwargs:\n  until: ['.']\n  max_gen_toks: 4")  # fmt: skip
    (tmp_path / "choosing.yaml").write_text(choice)
    (tmp_path / "writing.yaml").write_text(write)
    return tmp_path


def test_tasks_of_ones_own_are_scored(loaded, folder):
    steps = []
    job = Job(model="", backend="rowwise", tasks=("choosing", "writing"), task_folder=str(folder))
    scores = measure_tasks(loaded, job, SimpleNamespace(step=lambda step: steps.append((step.done, step.of))))
    found = {(score.task, score.metric): score for score in scores}
    accuracy = found["choosing", "acc"]
    assert accuracy.examples == 4
    assert accuracy.value == chosen_rightly(loaded)
    assert ("writing", "exact_match") in found
    assert (12, 12) in steps, "three choices of four questions"


def chosen_rightly(loaded):
    """The same share from the logits, without lm-eval."""
    right = 0
    for number, word in enumerate(("dog", "cat", "house", "road")):
        context = loaded.tokenizer(f"The {word} is", add_special_tokens=False).input_ids
        sums = []
        for choice in (" here", " there", " gone"):
            whole = loaded.tokenizer(f"The {word} is{choice}", add_special_tokens=False).input_ids
            rows = torch.log_softmax(loaded.logits(whole), dim=-1)
            sums.append(sum(float(rows[at - 1, whole[at]]) for at in range(len(context), len(whole))))
        right += max(range(3), key=sums.__getitem__) == number % 3
    return right / 4


def test_a_continuation_has_the_likelihood_of_its_tokens(loaded):
    tokens = loaded.tokenizer("It is a truth universally acknowledged", add_special_tokens=False).input_ids
    rows = torch.log_softmax(loaded.logits(tokens), dim=-1)
    expected = sum(float(rows[at - 1, tokens[at]]) for at in range(2, len(tokens)))
    assert likelihood(loaded, tokens[:2], tokens[2:])[0] == pytest.approx(expected, rel=1e-4)
    best = int(rows[-1].argmax())
    assert likelihood(loaded, tokens, [best]) == (pytest.approx(float(rows[-1].max()), rel=1e-4), True)
    assert math.isfinite(likelihood(loaded, tokens * 200, tokens)[0]), "longer than the context: its end counts"


def test_generation_ends_at_a_stop_text(loaded):
    whole = continued(loaded, "It is a", {"max_gen_toks": 8})
    stop = whole[len(whole) // 2]
    assert continued(loaded, "It is a", {"max_gen_toks": 8, "until": [stop]}) == whole.partition(stop)[0]


def test_an_unknown_task_is_said(loaded, folder):
    with pytest.raises(ConfigError, match="no task 'chosing' in .* among lm-eval's own. Did you mean 'choosing'"):
        measure_tasks(loaded, Job(model="", backend="rowwise", tasks=("chosing",), task_folder=str(folder)))
