"""A part of the zoo in every run: architectures that differ in kind, each through every on-the-fly backend.

`python -m nox -s zoo` runs all of them.
"""

from __future__ import annotations

import pytest

from . import zoo

KINDS = [
    "axk1",  # a norm that transformers renames, and leaves out of other layers
    "axk2",  # Linear layers that stay in float32
    "bailing_hybrid",  # tensors that transformers renames in what it saves
    "camembert",  # the tied head comes before the embedding, and has a tied bias
    "ctrl",  # a tied head with a bias of its own
    "gemma2", "gpt2", "mamba2", "olmoe", "phi3",
]  # fmt: skip
BACKENDS = zoo.on_the_fly()


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    """A checkpoint of the architecture."""
    found = {kind: (config, model_class) for kind, config, model_class in zoo.configs(KINDS)}
    if request.param not in found:
        pytest.skip(f"transformers builds no small {request.param} here")
    return zoo.build(*found[request.param], tmp_path_factory.mktemp("zoo") / "model")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_passes_or_is_refused_before_work(model, backend):
    outcome, said = zoo.cell(model, backend)
    assert outcome in ("passes", "partly", "unsaved", "refused"), said
    assert said or outcome == "passes"


def test_the_table_has_a_line_for_each_model_and_a_column_for_each_backend():
    rows = [{"model": "llama", "backend": "hqq", "outcome": "passes", "said": ""},
            {"model": "llama", "backend": "fp8", "outcome": "refused", "said": "load: h_k <no>"},
            {"model": "gpt2", "backend": "hqq", "outcome": "refused", "said": "load: h_k <no>"}]  # fmt: skip
    lines = zoo.page(rows).splitlines()
    assert lines[lines.index("| model | fp8 | hqq |") :] == [
        "| model | fp8 | hqq |", "|---|---|---|", "| gpt2 |  | refused |", "| llama | refused | passes |", "",
        "## What is said", "", r"- llama with fp8, gpt2 with hqq: load: h\_k \<no\>",
    ]  # fmt: skip
