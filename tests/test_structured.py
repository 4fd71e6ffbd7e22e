"""Answers that fit a JSON schema: whatever the model would say, whoever runs it, and however tokens are chosen."""

import json
from pathlib import Path

import jsonschema
import polyquant
import pytest
import torch
from polyquant.errors import ConfigError, EnvironmentProblem
from polyquant.models import structured
from polyquant.testing.models import tiny_model

from .serving import client_of, serving_of

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}  # fmt: skip
SCHEMAS = {
    "object": PERSON,
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "choice": {"anyOf": [{"const": 7}, {"type": "null"}]},
    "reference": {
        "$defs": {"p": PERSON},
        "type": "array",
        "items": {"$ref": "#/$defs/p"},
        "minItems": 1,
        "maxItems": 1,
    },
    "text": {"type": "string", "pattern": "^[a-c]{3}$"},
}
SAMPLING = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 2.0, "seed": 5}}
PROMPT = "The captain"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=["steps", "modules", "llama.cpp"])
def loaded(request, bitsandbytes, folder, tmp_path_factory):
    """Each way in which tokens are made: a loop of our own, transformers', another runtime."""
    if request.param != "llama.cpp":
        kernel = "packed" if request.param == "steps" else "library"
        return polyquant.load(folder, "bitsandbytes", device="cpu", kernel=kernel)
    pytest.importorskip("llama_cpp")
    out = tmp_path_factory.mktemp("gguf") / "made"
    polyquant.quantize(folder, "gguf", out, type="Q8_0", device="cpu")
    return polyquant.load(next(out.glob("*.gguf")), "llama-cpp", device="cpu")


@pytest.mark.parametrize("how", SAMPLING)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_an_answer_fits_its_schema(loaded, schema, how):
    answer = loaded.generate(PROMPT, schema=SCHEMAS[schema], max_new_tokens=150, **SAMPLING[how])
    jsonschema.validate(json.loads(answer), SCHEMAS[schema])
    assert "\n" not in answer


def test_log_probabilities_are_those_without_a_schema(loaded):
    ids = loaded.tokenizer(PROMPT)["input_ids"]
    first = next(loaded.tokens(ids, schema=PERSON, top=2, max_new_tokens=5))
    free = next(loaded.tokens(ids, top=2, max_new_tokens=5))
    assert first.top == free.top
    assert first.id not in {token for token, _ in free.top} or first.logprob == free.top[0][1]


def test_an_answer_that_has_no_room_is_cut(loaded):
    assert loaded.generate(PROMPT, schema=PERSON, max_new_tokens=2, do_sample=False).startswith("{")


@pytest.mark.parametrize(
    ("schema", "how", "words"),
    [
        ({"type": "wonder"}, {}, "schema cannot be kept to: Invalid type: wonder"),
        ({"not": {"type": "string"}}, {}, "schema cannot be kept to: Unimplemented keys"),
        ([1], {}, "schema must be a JSON schema"),
        (PERSON, {"min_new_tokens": 3}, "ends where it is whole: leave min_new_tokens"),
    ],
)
def test_what_cannot_be_kept_to_is_refused(loaded, schema, how, words):
    with pytest.raises(ConfigError, match=words):
        loaded.generate(PROMPT, schema=schema, **how)


def test_beams_are_refused(rowwise, folder):
    model = polyquant.load(folder, "rowwise", device="cpu")
    with pytest.raises(ConfigError, match="a schema is kept to .* num_beams asks for another way"):
        model.generate(PROMPT, schema=PERSON, num_beams=2)
    with pytest.raises(ConfigError, match="the model names none that ends a text"):
        model.generate(PROMPT, schema=PERSON, eos_token_id=[])


def test_rows_of_an_embedding_that_are_no_tokens_are_never_chosen(rowwise, folder):
    model = polyquant.load(folder, "rowwise", device="cpu")
    size = len(model.tokenizer)
    model.model.resize_token_embeddings(size + 90, mean_resizing=False)
    with torch.no_grad():
        head = model.model.get_output_embeddings().weight
        head[size:] = 100 * head[:size].abs().max()
    assert json.loads(model.generate(PROMPT, schema=SCHEMAS["array"], max_new_tokens=60, do_sample=False))


def test_without_the_library_it_is_said_how_to_have_it(loaded, monkeypatch):
    monkeypatch.setattr(structured, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"need llguidance.*pip install 'polyquant\[schema\]'"):
        loaded.generate(PROMPT, schema=PERSON)


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_keeps_to_response_format(rowwise, folder, stream):
    model = polyquant.load(folder, "rowwise", device="cpu")
    model.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    asked = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 200}
    named = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    with serving_of(model) as server, client_of(server) as client:
        made = client.chat.completions.create(response_format=named, stream=stream, **asked)
        parts = [each.choices[0].delta.content or "" for each in made] if stream else [made.choices[0].message.content]
        jsonschema.validate(json.loads("".join(parts)), PERSON)
        free = client.chat.completions.create(response_format={"type": "text"}, **asked).choices[0].message.content
        assert free == client.chat.completions.create(**asked).choices[0].message.content
        whole = client.chat.completions.create(response_format={"type": "json_object"}, **asked)
        assert whole.choices[0].message.content.startswith("{")


def test_a_command_reads_the_schema_from_a_file(run_python, folder, tmp_path):
    file = tmp_path / "array.json"
    file.write_text(json.dumps(SCHEMAS["array"]))
    words = ["run", str(folder), "-b", "bitsandbytes:nf4", PROMPT]
    done = run_python(*words, "--schema", str(file))
    jsonschema.validate(json.loads(done.stdout), SCHEMAS["array"])
    file.write_text("[1")
    done = run_python(*words, "--schema", str(file))
    assert (done.returncode, "array.json is no JSON" in done.stderr) == (2, True)
