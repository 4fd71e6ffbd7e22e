"""What `polyquant check-backend` checks: a backend alone, or with what its own test class says of it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from polyquant.errors import ConfigError
from polyquant.testing.subject import Subject

if TYPE_CHECKING:
    from polyquant.testing.suite import BackendConformance


FOLDER = "polyquant_tests"  # what the folder of a test file is called as a package


class Checked(NamedTuple):
    """A subject, and the failures that its authors know of."""

    subject: Subject
    expected_failures: Mapping[str, str]


def checked(backend: str, folder: Path, *, device: str = "auto", tests: Path | None = None) -> Checked:
    """The subject for a backend's checks.

    folder: for what the checks write; tests: a file with a BackendConformance class of this backend, for its floors,
    expected failures, real model and checkpoints. Without, quality is measured and not judged.
    Raises ConfigError where `tests` holds no such class.
    """
    if tests is None:
        return Checked(Subject(backend, folder, floors=None, device=device), {})
    suite = _suite_in(tests, backend)
    own = suite().make_checkpoint if _makes_checkpoints(suite) else None
    chosen = suite.device if device == "auto" else device
    subject = Subject(backend, folder, suite.floors, suite.real_model, chosen, own)
    return Checked(subject, suite.expected_failures)


def _suite_in(tests: Path, backend: str) -> type[BackendConformance]:
    try:
        from polyquant.testing.suite import BackendConformance
    except ImportError as error:
        message = f"reading {tests} needs pytest: pip install 'polyquant[testing]', or leave --tests out"
        raise ConfigError(message) from error
    spec = importlib.util.spec_from_file_location(f"{FOLDER}.{tests.stem}", tests)
    if spec is None or spec.loader is None or not tests.is_file():
        raise ConfigError(f"{tests} is no Python file; give the one with your BackendConformance class")
    sys.modules[FOLDER] = folder = ModuleType(FOLDER)  # for `from .helpers import ...`
    folder.__path__ = [str(tests.parent)]
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{tests} cannot be imported: {type(error).__name__}: {error}") from error
    found = {
        value.backend: value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, BackendConformance) and value is not BackendConformance
    }
    if backend not in found:
        there = ", ".join(map(repr, found)) or "none"
        raise ConfigError(f"{tests} has no BackendConformance class whose backend is {backend!r}; there is {there}")
    return found[backend]


def _makes_checkpoints(suite: type[BackendConformance]) -> bool:
    from polyquant.testing.suite import BackendConformance

    return suite.make_checkpoint is not BackendConformance.make_checkpoint
