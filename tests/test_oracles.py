"""What backends are held against: the record that their tests write, and the table that is made of it."""

import ast
import sys

import msgspec
import pytest
import torch
from polyquant.testing.oracles import SETTING, Agreement, agree, read

from .snippets import ROOT

sys.path.insert(0, str(ROOT / "docs"))

import generate  # noqa: E402
from generate_oracles import TRANSFORMERS, backend_of, oracles_page  # noqa: E402

ONE = torch.tensor([1.0, -2.0, 4.0])


def test_the_table_is_as_generated():
    page = generate.DOCS / "reference" / "oracles.md"
    assert page.read_text(encoding="utf-8") == generate.pages()[page], "run python docs/generate.py"


def test_every_method_of_transformers_is_a_row_and_every_backend():
    auto = pytest.importorskip("transformers.quantizers.auto")
    if len(auto.AUTO_QUANTIZER_MAPPING) == len(TRANSFORMERS):  # 5.23's
        assert sorted(TRANSFORMERS) == sorted(auto.AUTO_QUANTIZER_MAPPING)
    cards, page = generate.ours(), oracles_page(generate.ours(), {}, ())
    assert all(f"| `{method}` | [" in page for method in TRANSFORMERS)
    assert all(f"[{card.name}](../backends/{card.name}.md)" in page for card in cards)
    assert backend_of("metal", cards).name == "mlx"
    assert (backend_of("gptq", cards).name, backend_of("gguf", cards).name) == ("gptq", "gguf")


def test_every_backend_was_held_against_something_by_a_test_that_is_there():
    seen = read(generate.ORACLES)
    assert {card.name for card in generate.ours()} <= seen.keys()
    for backend, oracles in seen.items():
        assert oracles
        for oracle, one in oracles.items():
            path, name = one.test.split("::")
            functions = {
                node.name
                for node in ast.walk(ast.parse((ROOT / path).read_text()))
                if isinstance(node, ast.FunctionDef)
            }
            assert name.partition("[")[0] in functions, (
                f"{backend}: {oracle}: {one.test} is gone: write the record anew"
            )
            assert one.difference <= one.allowed
            assert one.numbers > 0


def test_the_largest_difference_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "oracles.json"
    monkeypatch.setenv(SETTING, str(path))
    path.write_text(
        msgspec.json.encode({"other": {"code": Agreement(difference=0, allowed=0, numbers=1, test="t")}}).decode()
    )
    for added in (0.0, 0.04, 0.02):
        agree("acme", "a library", ONE + added, ONE, allowed=0.1)
    found = read(path)
    assert set(found) == {"acme", "other"}
    one = found["acme"]["a library"]
    assert (one.difference, one.allowed, one.numbers) == (pytest.approx(0.01), 0.1, 9)
    assert one.test == "tests/test_oracles.py::test_the_largest_difference_is_kept"
    assert read(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    ("found", "words"),
    [(ONE * 1.5, "acme is 0.5 from a library, and 0.1 is allowed"), (ONE[:2], r"acme: \(2,\), and a library: \(3,\)"),
     (ONE * float("nan"), "acme is nan from a library")],
)  # fmt: skip
def test_what_is_further_off_than_allowed_fails(found, words):
    with pytest.raises(AssertionError, match=words):
        agree("acme", "a library", found, ONE, allowed=0.1)
