"""Writing folders all or nothing."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from polyquant.errors import BackendFailed, PolyquantError, SaveError
from polyquant.support.outputs import mark, require_free, resolved

PARTIAL, BEFORE = ".partial-", ".before-"  # in names of folders beside an output: what becomes it, what it was
RENAME_EXCHANGE, AT_FDCWD = 2, -100  # Linux, renameat2(2)


def make_folder(folder: Path) -> Path:
    """`folder`, made where it is not there. Raises SaveError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"the folder {folder} cannot be made: {error}") from error
    return folder


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


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """The right to write `out`, which one process has at a time; another is refused. Nothing stays of the lock.

    Raises SaveError where another has it, or where it cannot be written.
    """
    from filelock import FileLock, Timeout

    path = out.with_name(f".{out.name}{PARTIAL}lock")
    lock = FileLock(path)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        while not path.exists():  # whoever had it took it away in between
            lock.release()
            lock.acquire(timeout=0)
    except Timeout:
        raise SaveError(f"another process is writing {out}; wait for it, or choose another folder") from None
    except OSError as error:
        raise SaveError(f"cannot write beside {out}: {error}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
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
def atomic_folder(out: Path, *, overwrite: bool, keeps: Iterable[Path] = (), marked: bool = True) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` when the block ends, and vanishes where it raises.

    keeps: what is read and must survive; see `require_free`. marked: whether a later output may replace it.
    A kill in the block leaves the old `out` as it was, and a folder `.NAME.partial-*`, which nothing loads by accident
    and the next writer of `out` removes. Raises SaveError where `require_free` does, where another process is writing
    `out`, or where writing fails.
    """
    keeps = tuple(keeps)
    require_free(out, overwrite=overwrite, keeps=keeps)
    out = resolved(out)  # not a link to it
    with claimed(out):
        try:
            _clear_up(out)
            require_free(out, overwrite=overwrite, keeps=keeps)
            partial = Path(tempfile.mkdtemp(prefix=f".{out.name}{PARTIAL}", dir=out.parent))
        except OSError as error:
            raise SaveError(f"cannot write beside {out}: {error}") from error
        try:
            partial.chmod(0o755)
            yield partial
            if marked:
                mark(partial)
            _swap(partial, out)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, PolyquantError) and not isinstance(error, BackendFailed):
                raise
            raise SaveError(
                f"writing {out} failed ({error}); {_room(error, out.parent)}what was at {out} is unchanged"
            ) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _clear_up(out: Path) -> None:
    """Remove what killed writers of `out` left beside it; where one was killed between two renames, undo the first."""
    for left in list(out.parent.iterdir()):
        if left.name.startswith(f".{out.name}{BEFORE}") and not out.exists():
            left.rename(out)
        elif left.is_dir() and left.name.startswith((f".{out.name}{BEFORE}", f".{out.name}{PARTIAL}")):
            shutil.rmtree(left, ignore_errors=True)


def _swap(partial: Path, out: Path) -> None:
    """`partial` takes the place of `out`, in one step where the system has one; what was there is deleted."""
    if not out.exists():
        partial.rename(out)
        return
    if _exchange(partial, out):
        shutil.rmtree(partial, ignore_errors=True)
        return
    before = partial.with_name(f".{out.name}{BEFORE}{partial.name.rpartition(PARTIAL)[2]}")
    try:
        out.rename(before)
        partial.rename(out)
    except BaseException:
        if before.exists() and not out.exists():
            before.rename(out)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places; False where the system or the disk cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


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
        raise SaveError(f"cannot write {path} ({error})" + f"; {_room(error, path.parent)}".rstrip("; ")) from error


def _room(error: BaseException | None, folder: Path) -> str:
    """Where the disk or a quota is full: how much is free in `folder`; else nothing."""
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there; " if is_full(error) else ""


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says that a disk or a quota is full."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or "No space left on device" in str(error):  # as safetensors words it, in an error of its own
            return True
        error = error.__cause__ or error.__context__
    return False
