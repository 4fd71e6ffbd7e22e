"""What the libraries leave behind when test files import them: `-p garbage`.

In memory: it is not searched for garbage again. A search of all that torch and transformers define takes a third of a
second, and thousands of tests ask for one, by themselves or through pytest; here it costs a tenth of the suite's time.
What tests make is searched as always.

In os.environ: what is read on import is taken back. gptqmodel and what it imports set six such variables, another
home of the hub's cache among them. Every process that a test starts would get them, and none of those could be forked
from a warm one (`polyquant.testing.warm`).
"""

from __future__ import annotations

import gc
import os

import pytest
from polyquant.testing.forking import read_on_import

BEFORE = read_on_import(os.environ)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Once the test files have imported what they import."""
    if session.items:
        import transformers.modeling_utils

        assert transformers
        gc.collect()
        gc.freeze()
    for name in read_on_import(os.environ).keys() - BEFORE.keys():
        del os.environ[name]
    os.environ.update(BEFORE)
