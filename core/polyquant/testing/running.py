"""Runs the checks without pytest: every check, every case, each with its outcome and reason."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

from polyquant.testing.catalog import ALL
from polyquant.testing.check import Case, Check, CheckFailed, NotApplicable
from polyquant.testing.subject import Subject
from polyquant.types import Record


class Outcome(Record, frozen=True):
    """What one run of a check found."""

    check: str
    case: str  # preset and model; empty where the check asks for neither
    status: Literal["passed", "failed", "not applicable"]
    reason: str = ""


def run_checks(
    subject: Subject, *, without: Collection[str] = (), models: Collection[str] | None = None, real: bool = True
) -> Iterator[Outcome]:
    """The outcome of every check on `subject`, as they come.

    without: names of checks to leave out; models: the only tiny models to use, where a check uses several;
    real: whether to run the checks that load the real model.
    """
    for each in ALL:
        if each.name not in without and (real or not each.real):
            for case in each.cases(list(subject.info.presets)):
                if models is None or not case.model or case.model in models:
                    yield run_check(each, subject, case)


def run_check(each: Check, subject: Subject, case: Case) -> Outcome:
    """The outcome of one run; whatever the backend raises is a failure."""
    name, shown = each.name, str(case)
    try:
        each.run(subject, case)
    except NotApplicable as skipped:
        return Outcome(check=name, case=shown, status="not applicable", reason=str(skipped))
    except CheckFailed as failure:
        return Outcome(check=name, case=shown, status="failed", reason=str(failure))
    except Exception as error:
        return Outcome(check=name, case=shown, status="failed", reason=f"{type(error).__name__}: {error}")
    return Outcome(check=name, case=shown, status="passed")
