"""What the libraries leave in memory when they are imported is not searched for garbage again: `-p garbage`.

A search of all that torch and transformers define takes a third of a second, and thousands of tests ask for one, by
themselves or through pytest; here it costs a tenth of the suite's time. What tests make is searched as always.
"""

from __future__ import annotations

import gc

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Once the test files have imported what they import."""
    if session.items:
        import transformers.modeling_utils

        assert transformers
        gc.collect()
        gc.freeze()
