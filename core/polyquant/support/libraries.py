"""Libraries: whether they are here in the right version, importing them without a word, what is wrong with them."""

from __future__ import annotations

import importlib
import io
import logging
import os
import random
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib import metadata

from polyquant.errors import EnvironmentProblem
from polyquant.types import Library, Problem


def library_problems(libraries: Iterable[Library]) -> list[Problem]:
    """Libraries that are missing or outside their tested window, read from metadata; imports nothing."""
    return list(each_library_problem(libraries))


def each_library_problem(libraries: Iterable[Library]) -> Iterator[Problem]:
    """`library_problems`, one by one: whoever wants to know only whether there is one need not see the others."""
    for library in libraries:
        version = installed_version(library.distribution)
        fix = f"pip install '{library.requirement}'" + (f" ({library.caution})" if library.caution else "")
        if version is None:
            yield Problem(what=f"{library.distribution} is not installed", fix=fix, kind="missing")
        elif not _allows(library.versions, version):
            what = f"{library.distribution} {version} is installed, {library.versions} was tested"
            yield Problem(what=what, fix=fix, kind="version")


def _allows(versions: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet  # takes milliseconds, which a listing can do without

    return SpecifierSet(versions, prereleases=True).contains(version)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Importing in the block logs no warnings: libraries tell there of kernels they have for other machines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def contained(*, progress: bool = False) -> Iterator[None]:
    """What a library changes of the process in the block is put back, and what it prints is dropped.

    For libraries that set environment variables, the root logger, warning filters and torch's use of TF32 when they
    are imported or used. progress: leave standard error alone, on which they draw their bars.
    """
    variables, state, precision = dict(os.environ), random.getstate(), _precision()
    root, level, handlers = logging.root, logging.root.level, logging.root.handlers[:]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(quiet_imports())
        stack.enter_context(redirect_stdout(io.StringIO()))
        if not progress:
            stack.enter_context(redirect_stderr(io.StringIO()))
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for name in set(os.environ) - set(variables):
                del os.environ[name]
            os.environ.update(variables)
            random.setstate(state)
            if "torch" in sys.modules:
                backends = sys.modules["torch"].backends
                backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = precision
            root.setLevel(level)
            root.handlers[:] = handlers


def _precision() -> tuple[bool, bool]:
    """Whether torch's convolutions and matrix products may use TF32; its defaults where it is not imported yet."""
    if "torch" not in sys.modules:
        return True, False
    backends = sys.modules["torch"].backends
    return backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32


def installed_version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def import_problems(libraries: Iterable[Library]) -> list[Problem]:
    """Installed libraries that fail to import, each with its own traceback."""
    problems = []
    for library in libraries:
        if installed_version(library.distribution) is None:
            continue
        try:
            with contained():
                importlib.import_module(library.module or library.distribution)
        except Exception as error:
            problems.append(
                Problem(
                    what=f"{library.distribution} is installed but fails to import: {type(error).__name__}: {error}",
                    fix=f"pip install --force-reinstall '{library.requirement}'",
                    kind="import",
                    detail=traceback.format_exc(),
                )
            )
    return problems


def require_library(library: Library, what: str) -> None:
    """For a library that only one of a backend's hooks needs.

    Raises EnvironmentProblem, which begins with `what`, where it is missing, of another version, or fails to import.
    """
    refuse_problems(library_problems((library,)) or import_problems((library,)), what)


def refuse_problems(problems: Sequence[Problem], what: str) -> None:
    """Raises EnvironmentProblem, which begins with `what`, with every problem and its fix, where there are any."""
    if problems:
        lines = [f"  - {problem.what}\n    fix: {problem.fix}" for problem in problems]
        raise EnvironmentProblem(f"{what}:\n" + "\n".join(lines))
