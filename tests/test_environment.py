"""Checking and importing leave the process as it was."""

import logging
import os
import random
import warnings

from polyquant.environment import contained


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
