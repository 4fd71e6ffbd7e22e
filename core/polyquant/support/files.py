"""Writing folders all or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from polyquant.errors import BackendFailed, PolyquantError, SaveError


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """The right to make `out`, which one process has at a time; another waits. The lock `NAME.lock` stays beside it.

    Raises SaveError where it cannot be written.
    """
    from filelock import FileLock  # it imports asyncio

    lock = FileLock(f"{out}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise SaveError(f"cannot write beside {out}: {error}") from error
    try:
        yield
    finally:
        lock.release()


def once(out: Path, make: Callable[[Path], None]) -> Path:
    """`out`, made where it is not there: `make` fills an empty folder, in one process while others wait for it.

    Raises SaveError, and what `make` raises; nothing is left then.
    """
    if not out.is_dir():
        with locked(out):
            if not out.is_dir():
                with atomic_folder(out, overwrite=False) as partial:
                    make(partial)
    return out


@contextmanager
def atomic_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` when the block ends, and vanishes where it raises.

    A kill in the block leaves a folder `.NAME.partial-*`, which nothing loads by accident, and the old `out` as it
    was. Raises SaveError where `out` exists and `overwrite` is false, or where writing fails.
    """
    if out.exists() and not overwrite:
        raise SaveError(f"{out} exists; choose another folder, or replace it with overwrite=True (--overwrite)")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise SaveError(f"cannot write beside {out}: {error}") from error
    try:
        partial.chmod(0o755)
        yield partial
        _swap(partial, out)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, PolyquantError) and not isinstance(error, BackendFailed):
            raise
        free = shutil.disk_usage(out.parent).free
        raise SaveError(
            f"writing {out} failed ({error}); {free / 2**20:.0f} MiB are free there; what was at {out} is unchanged"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _swap(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent)) / out.name
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """The whole file or, after a kill, the one that was there before. Raises SaveError where it cannot be written."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise SaveError(f"cannot write {path} ({error}); {free / 2**20:.0f} MiB are free there") from error
