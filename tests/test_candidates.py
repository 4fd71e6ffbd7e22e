"""Candidates as people write them."""

import re

import polyquant
import pytest
from polyquant.api import registry
from polyquant.comparison.candidates import Candidate, parse, presets_of
from polyquant.errors import ConfigError, UnknownBackend

pytestmark = pytest.mark.usefixtures("rowwise")


def read(text: str) -> Candidate:
    return parse(text, registry().info)


def test_a_candidate_is_a_backend_with_a_preset_and_options():
    assert read("rowwise") == Candidate(name="rowwise:int8", backend="rowwise", options={"bits": 8})
    assert read("rowwise:int8") == Candidate(name="rowwise:int8", backend="rowwise", options={"bits": 8})
    text = "rowwise:int8,compute_dtype=bfloat16,skip=layers.0,lm_head,skip_defaults=false"
    assert read(text).options == {
        "bits": 8, "compute_dtype": "bfloat16", "skip": ("layers.0", "lm_head"), "skip_defaults": False,
    }  # fmt: skip
    assert read("rowwise:bits=8").options == {"bits": 8}


def test_a_candidate_may_be_a_checkpoint():
    assert read("models/made.gguf") == Candidate(name="models/made.gguf", backend="", model="models/made.gguf")
    assert read("rowwise@made:bits=8").model == "made"
    assert read("owner/name").model == "owner/name"


def test_the_dense_model_is_a_candidate():
    assert read("dense").options == {"compute_dtype": "float32"}
    assert read("dense:bfloat16").options == {"compute_dtype": "bfloat16"}


def test_presets_become_candidates():
    assert [candidate.name for candidate in presets_of(polyquant.backend("rowwise").info)] == [
        "rowwise:int8",
        "rowwise:int8-bf16-scales",
    ]


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("rowise:int8", UnknownBackend, "Did you mean 'rowwise'?"),
        (
            "rowwise:int7",
            ConfigError,
            "rowwise has no preset 'int7'; there are int8, int8-bf16-scales. Did you mean 'int8'?",
        ),
        ("rowwise:bits=3", ConfigError, "bits must be"),
        ("rowwise:bit=8", ConfigError, "unknown option 'bit'"),
        ("rowwise:int8,nf4", ConfigError, "'nf4' is neither a preset nor name=value"),
        ("rowwise:bits=8,bits=8", ConfigError, "gives bits twice"),
        ("rowwise:", ConfigError, "is no candidate; one is written as"),
        ("rowwise@", ConfigError, "is no candidate"),
        ("", ConfigError, "is no candidate"),
        ("models/made.gguf:bits=8", ConfigError, "name the backend that is to read the checkpoint"),
        ("dense:int8", ConfigError, "compute_dtype must be"),
    ],
)
def test_what_is_no_candidate_is_said(text, error, said):
    with pytest.raises(error, match=re.escape(said)):
        read(text)
