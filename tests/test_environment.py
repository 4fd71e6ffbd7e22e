"""Checking and importing leave the process as it was."""

import logging
import os
import random
import warnings

from polyquant.support.libraries import contained, library_problems
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


def test_a_fix_says_what_to_know_before_installing():
    library = Library(distribution="no-such-library", versions=">=1", caution="not beside torch 1")
    (problem,) = library_problems((library,))
    assert problem.fix == "pip install 'no-such-library>=1' (not beside torch 1)"
