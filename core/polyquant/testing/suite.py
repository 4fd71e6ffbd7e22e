"""The conformance suite as a pytest class. The only file here that imports pytest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

import polyquant
from polyquant.errors import did_you_mean
from polyquant.testing.advice import advise
from polyquant.testing.catalog import ALL, cases
from polyquant.testing.check import Case, ConformanceCheck, Floor, NotApplicable
from polyquant.testing.plugin import shared_folder
from polyquant.testing.running import expected_reason
from polyquant.testing.schemes import not_in_presets
from polyquant.testing.subject import Subject

RUNS: dict[type, list[tuple[ConformanceCheck, Case]]] = {}  # of the session, by test class
SUBJECTS: dict[type, Subject] = {}  # of the session: loaded models and quantized checkpoints are shared by the tests


class BackendConformance:
    """Derive a test class from this, name the backend, and every capability it declares is put to the test.

    Each test says in its docstring what it holds the backend to; `polyquant.testing.catalog.ALL` lists them, and
    `polyquant.testing.catalog.cases` what each is run on: every preset on one architecture, the other architectures
    once for each scheme.
    """

    backend: ClassVar[str]
    floors: ClassVar[Mapping[str, Floor]] = {}
    """preset -> how close it stays to the dense model; every preset needs one."""
    expected_failures: ClassVar[Mapping[str, str]] = {}
    """'test_name', 'test_name[preset]' or 'test_name[preset-model]' -> reason. One that passes fails the run."""
    real_model: ClassVar[str] = "builtin:smollm2"
    real_is_slow: ClassVar[bool] = False
    """Whether tests on the real model take minutes: they are then marked slow too."""
    device: ClassVar[str] = "auto"

    def make_checkpoint(self, dense: Path, preset: str, out: Path) -> Path:
        """Override for a backend that reads checkpoints it cannot make: write one of the model `dense` into `out`.

        preset: of the card, or what it declares and no preset has, such as 'bits=3'; `options` gives the options.
        """
        raise NotImplementedError

    def options(self, preset: str) -> dict[str, Any]:
        """The options of a preset, or those that come to what the card declares; empty where none do."""
        handle = polyquant.backend(self.backend)
        return dict(handle.info.presets.get(preset) or not_in_presets(handle).get(preset) or {})

    def pytest_generate_tests(self, metafunc: Any) -> None:
        each = getattr(metafunc.function, "conformance_check", None)
        if each is None:
            return
        runs = _runs(self)
        if each.per != "backend":
            own = [case for one, case in runs if one is each]
            metafunc.parametrize("case", [pytest.param(case, id=str(case), marks=_marks(self, each)) for case in own])

    def _subject(self, tmp_path_factory: Any) -> Subject:
        own = type(self)
        if own not in SUBJECTS:
            makes = own.make_checkpoint is not BackendConformance.make_checkpoint
            SUBJECTS[own] = Subject(
                backend=self.backend,
                folder=shared_folder(tmp_path_factory),
                floors=self.floors,
                real_model=self.real_model,
                device=self.device,
                make_checkpoint=self.make_checkpoint if makes else None,
            )
        return SUBJECTS[own]

    def _run(self, each: ConformanceCheck, subject: Subject, case: Case) -> None:
        reason = expected_reason(self.expected_failures, each, case)
        try:
            each.run(subject, case)
        except NotApplicable as skipped:
            if reason:
                pytest.fail(f"is expected to fail ({reason}), but is not run at all: {skipped}", pytrace=False)
            pytest.skip(str(skipped))
        except Exception as error:
            if reason:
                pytest.xfail(f"{reason} ({error})")
            if cure := advise(subject, each.name, error):
                error.add_note(f"cure: {cure}")
            raise
        if reason:
            pytest.fail(f"passes now; take it out of expected_failures, which says: {reason}", pytrace=False)


def _test(each: ConformanceCheck) -> Any:
    """The test method of a check."""
    if each.per == "backend":

        def test(self: BackendConformance, tmp_path_factory: Any) -> None:
            self._run(each, self._subject(tmp_path_factory), Case())

    else:

        def test(self: BackendConformance, tmp_path_factory: Any, case: Case) -> None:  # type: ignore[misc]
            self._run(each, self._subject(tmp_path_factory), case)

    test.__name__ = test.__qualname__ = f"test_{each.name}"
    test.__doc__ = each.function.__doc__
    test.conformance_check = each  # type: ignore[attr-defined]
    return test


for _each in ALL:
    setattr(BackendConformance, f"test_{_each.name}", _test(_each))


def _runs(suite: BackendConformance) -> list[tuple[ConformanceCheck, Case]]:
    """What the suite runs, planned once. Raises ValueError as `_require_known` does."""
    own = type(suite)
    if own not in RUNS:
        handle = polyquant.backend(suite.backend)
        runs = cases(handle)
        _require_known(suite, list(handle.info.presets), runs)
        RUNS[own] = runs
    return RUNS[own]


def _marks(suite: BackendConformance, each: ConformanceCheck) -> list[pytest.MarkDecorator]:
    """What the real model asks for."""
    return [pytest.mark.real, *([pytest.mark.slow] if suite.real_is_slow else [])] if each.real else []


def _require_known(suite: BackendConformance, presets: list[str], runs: list[tuple[ConformanceCheck, Case]]) -> None:
    """Raises ValueError where expected_failures or floors name what is not there."""
    tests = {f"test_{each.name}" for each in ALL}
    for each, case in runs:
        tests |= {f"test_{each.name}[{case}]", f"test_{each.name}[{case.preset}]"}
    for what, known, given in (("test", tests, suite.expected_failures), ("preset", presets, suite.floors)):
        for name in given:
            if name not in known:
                raise ValueError(f"{type(suite).__name__}: there is no {what} {name!r}.{did_you_mean(name, known)}")
