"""Runs the checks without pytest: every check, every case, each with its outcome, reason and cure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from time import perf_counter
from typing import Literal

from polyquant.testing.advice import advise
from polyquant.testing.catalog import cases
from polyquant.testing.check import Case, CheckFailed, ConformanceCheck, NotApplicable
from polyquant.testing.subject import Subject
from polyquant.types import Record


class Outcome(Record, frozen=True):
    """What one run of a check found."""

    check: str
    case: str  # preset and model; empty where the check asks for neither
    status: Literal["passed", "failed", "not applicable", "failed as expected"]
    reason: str = ""
    cure: str = ""  # where it failed: file and line, hook, what to do
    seconds: float = 0.0


def planned(
    subject: Subject, *, without: Collection[str] = (), models: Collection[str] | None = None, real: bool = True
) -> list[tuple[ConformanceCheck, Case]]:
    """Every run of every check on `subject`; the arguments are those of `run_checks`."""
    return [
        (each, case)
        for each, case in cases(subject.handle)
        if each.name not in without and (real or not each.real)
        if models is None or not case.model or case.model in models
    ]


def run_checks(
    subject: Subject, *, without: Collection[str] = (), models: Collection[str] | None = None, real: bool = True,
    expected_failures: Mapping[str, str] | None = None, begin: Callable[[ConformanceCheck, Case], None] | None = None,
) -> Iterator[Outcome]:  # fmt: skip
    """The outcome of every check on `subject`, as they come.

    without: names of checks to leave out; models: the only tiny models to use, where a check uses several;
    real: whether to run the checks that load the real model; expected_failures: as in `BackendConformance`;
    begin: called before each run.
    """
    for each, case in planned(subject, without=without, models=models, real=real):
        if begin is not None:
            begin(each, case)
        outcome = run_check(each, subject, case)
        reason = expected_reason(expected_failures or {}, each, case)
        yield _against_expectation(outcome, reason) if reason else outcome


def run_check(each: ConformanceCheck, subject: Subject, case: Case) -> Outcome:
    """The outcome of one run; whatever the backend raises is a failure."""
    name, shown, started = each.name, str(case), perf_counter()
    try:
        each.run(subject, case)
    except NotApplicable as skipped:
        return Outcome(check=name, case=shown, status="not applicable", reason=str(skipped))
    except Exception as error:
        reason = str(error) if isinstance(error, CheckFailed) else f"{type(error).__name__}: {error}"
        return Outcome(
            check=name, case=shown, status="failed", reason=reason, cure=advise(subject, name, error),
            seconds=perf_counter() - started,
        )  # fmt: skip
    return Outcome(check=name, case=shown, status="passed", seconds=perf_counter() - started)


def expected_reason(failures: Mapping[str, str], each: ConformanceCheck, case: Case) -> str:
    """Why a run is expected to fail; empty where it is not. `failures`: as in `BackendConformance`."""
    names = (f"test_{each.name}[{case}]", f"test_{each.name}[{case.preset}]", f"test_{each.name}")
    return next((failures[name] for name in names if name in failures), "")


def _against_expectation(outcome: Outcome, reason: str) -> Outcome:
    """Strict both ways: what was expected to fail, and passes or is not run, fails."""
    said, status = f"{reason} ({outcome.reason})", "failed as expected"
    if outcome.status != "failed":
        status = "failed"
        passes = f"passes now; take it out of expected_failures, which says: {reason}"
        not_run = f"is expected to fail ({reason}), but is not run at all: {outcome.reason}"
        said = passes if outcome.status == "passed" else not_run
    return Outcome(
        check=outcome.check, case=outcome.case, status=status, reason=said,  # type: ignore[arg-type]
        seconds=outcome.seconds,
    )  # fmt: skip
