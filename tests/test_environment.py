"""Checking and importing leave the process as it was."""

import logging
import os
import random
import sys
import warnings

import pytest
from polyquant.errors import EnvironmentProblem
from polyquant.support.libraries import contained, library_problems, require_library
from polyquant.types import Library


def test_what_a_library_changes_is_put_back(capfd):
    os.environ["POLYQUANT_TEST_KEPT"] = "before"
    before = dict(os.environ), logging.root.level, list(logging.root.handlers), len(warnings.filters), random.getstate()
    with contained():
        os.environ["POLYQUANT_TEST_ADDED"] = "1"
        os.environ["POLYQUANT_TEST_KEPT"] = "after"
        logging.root.setLevel(logging.DEBUG)
        logging.root.addHandler(logging.NullHandler())
        warnings.simplefilter("ignore")
        random.seed(1)
        print("a banner")
    assert before == (
        dict(os.environ), logging.root.level, list(logging.root.handlers), len(warnings.filters), random.getstate()
    )  # fmt: skip
    assert capfd.readouterr() == ("", "")
    del os.environ["POLYQUANT_TEST_KEPT"]


def test_bars_may_stay(capfd):
    with contained(progress=True):
        print("a banner")
        print("a bar", file=sys.stderr)
    assert capfd.readouterr() == ("", "a bar\n")


def test_a_library_for_one_hook_is_refused_with_its_fix():
    require_library(Library(distribution="msgspec", versions=">=0.18"), "Checkpoints are made with msgspec")
    missing = Library(distribution="polyquant-nowhere", versions=">=2")
    words = r"^Made with it:\n  - polyquant-nowhere is not installed\n    fix: pip install 'polyquant-nowhere>=2'$"
    with pytest.raises(EnvironmentProblem, match=words):
        require_library(missing, "Made with it")
    broken = Library(distribution="msgspec", module="msgspec.nowhere")
    with pytest.raises(EnvironmentProblem, match="msgspec is installed but fails to import: ModuleNotFoundError"):
        require_library(broken, "Made with it")


def test_a_fix_says_what_to_know_before_installing():
    library = Library(distribution="no-such-library", versions=">=1", caution="not beside torch 1")
    (problem,) = library_problems((library,))
    assert problem.fix == "pip install 'no-such-library>=1' (not beside torch 1)"
