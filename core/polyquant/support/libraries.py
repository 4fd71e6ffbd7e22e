"""Libraries: whether they are here in the right version, importing them without a word, what is wrong with them."""

from __future__ import annotations

import importlib
import io
import logging
import os
import random
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib import metadata
from typing import NamedTuple

from polyquant.errors import EnvironmentProblem
from polyquant.types import Library, Problem


class LookAlike(NamedTuple):
    """A distribution that an index has under the name of something else."""

    version: str  # that the index has
    what: str  # what that is
    instead: str  # the command that installs what the name promises


LOOK_ALIKES = {
    "triton-kernels": LookAlike(
        "0.1.0", "has nothing to do with OpenAI's kernels of that name",
        "pip install 'git+https://github.com/triton-lang/triton.git#subdirectory=python/triton_kernels'",
    ),
    "qutlass": LookAlike(
        "0.0.0", "is a placeholder without kernels",
        "pip install --no-build-isolation 'git+https://github.com/IST-DASLab/qutlass.git'",
    ),
}  # fmt: skip
"""By name as pip compares them. They are never advised, and where they are installed they are a problem."""


def install_command(requirement: str, flags: str = "") -> str:
    """What installs a requirement, as pip takes it; of a look-alike's name, what installs the one that is meant."""
    if other := look_alike(requirement):
        return f"{other.instead} (the {requirement} of the index {other.what})"
    return f"pip install {flags}'{requirement}'"


def look_alike(requirement: str) -> LookAlike | None:
    """What the index has under the name of a requirement, where that is something else."""
    name = re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0]
    return LOOK_ALIKES.get(re.sub(r"[-_.]+", "-", name).lower())


def library_problems(libraries: Iterable[Library]) -> list[Problem]:
    """Libraries that are missing or outside their tested window, read from metadata; imports nothing."""
    return list(each_library_problem(libraries))


def each_library_problem(libraries: Iterable[Library]) -> Iterator[Problem]:
    """`library_problems`, one by one: whoever wants to know only whether there is one need not see the others."""
    for library in libraries:
        version = installed_version(library.distribution)
        fix = install_command(library.requirement) + (f" ({library.caution})" if library.caution else "")
        other = look_alike(library.distribution)
        if version is None:
            yield Problem(what=f"{library.distribution} is not installed", fix=fix, kind="missing")
        elif other and version == other.version:
            yield Problem(
                what=f"{library.distribution} {version} is installed, and {other.what}", fix=fix, kind="version"
            )
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
                    fix=install_command(library.requirement, "--force-reinstall "),
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
