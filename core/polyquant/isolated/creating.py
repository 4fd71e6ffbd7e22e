"""Makes an environment: locked against a second creator, and used only when it is whole."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from polyquant.errors import EnvironmentProblem
from polyquant.isolated import installer
from polyquant.isolated.environments import RECORD, Environment, Made, remove
from polyquant.isolated.installer import Index
from polyquant.isolated.worker import Worker
from polyquant.support.files import write_atomically
from polyquant.support.processes import explain, run_logged
from polyquant.support.progress import Progress, Step

LIMIT_SECONDS = 4 * 3600.0
LISTS = "from importlib.metadata import distributions as d; print(*sorted({f'{x.name}=={x.version}' for x in d()}))"


def create(
    environment: Environment, index: Index, progress: Progress, *, again: bool = False, uv: str | None = None
) -> bool:
    """Make `environment` where it is not there, or `again`; gives whether it had to.

    Raises EnvironmentProblem, with the installer's last words, and leaves nothing that is used.
    """
    with _locked(environment, progress):
        if not again and environment.problem() is None:
            return False
        if environment.folder.exists():
            remove(environment.folder)
        try:
            _fill(environment, index, progress, uv)
            progress.step(Step(what="trying it"))
            Worker(environment, unfinished=True).close()
            write_atomically(environment.folder / RECORD, _record(environment).to_json())
        except BaseException:
            shutil.rmtree(environment.folder, ignore_errors=True)
            raise
        return True


def _fill(environment: Environment, index: Index, progress: Progress, uv: str | None) -> None:
    folder = environment.folder
    commands, log, pins = folder.with_suffix(".commands"), folder.with_suffix(".log"), installer.write_pins(environment)
    write_atomically(commands, msgspec.json.encode(installer.commands(environment, index, uv=uv)).decode())
    try:
        module = "polyquant.isolated.installing"
        ended = run_logged(module, [str(commands)], log, limit_seconds=LIMIT_SECONDS, progress=progress)
    finally:
        commands.unlink(missing_ok=True)
        pins.unlink(missing_ok=True)
    if ended.code != 0:
        free = shutil.disk_usage(folder.parent).free
        raise EnvironmentProblem(
            f"the environment {environment.name} could not be made: {explain(ended.code, LIMIT_SECONDS)}; "
            f"the installer said last:\n{ended.said}\n"
            f"{free / 2**20:.0f} MiB are free in {folder.parent}; all it said is in {log}. "
            "Without a network, give --find-links FOLDER with --no-index, or the index that can be reached with "
            "--index-url"
        )
    log.unlink(missing_ok=True)


def _record(environment: Environment) -> Made:
    listed = subprocess.run([environment.python, "-P", "-c", LISTS], capture_output=True, text=True, check=True)
    version = subprocess.run([environment.python, "--version"], capture_output=True, text=True, check=True)
    return Made(
        backend=environment.backend, isolated=environment.isolated, python=version.stdout.split()[-1],
        created=datetime.now(UTC).isoformat(timespec="seconds"), installed=tuple(listed.stdout.split()),
        stored_bytes=sum(path.lstat().st_size for path in environment.folder.rglob("*")),
    )  # fmt: skip


@contextmanager
def _locked(environment: Environment, progress: Progress) -> Iterator[None]:
    """The right to write the environment. Raises EnvironmentProblem where its folder cannot be written."""
    lock = lock_of(environment.folder)
    try:
        environment.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress.step(Step(what=f"another process is making {environment.name}; waiting for it"))
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise EnvironmentProblem(
            f"cannot write {environment.folder.parent}: {error}; choose another cache folder with POLYQUANT_CACHE"
        ) from error
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(f"making {environment.name} failed: {error}") from error
    finally:
        lock.release()


def lock_of(folder: Path) -> FileLock:
    """Held by whoever writes or removes the environment in `folder`."""
    return FileLock(str(folder.with_suffix(".lock")))
