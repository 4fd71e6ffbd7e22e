"""Bytes through a pipe, many at a time: on Linux a large tensor costs one copy, that of its reader."""

from __future__ import annotations

import ctypes
import os
from typing import Any

PIPE_BYTES = 2**19  # what a pipe shall hold: more no longer fits a processor's cache
F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032  # Linux, fcntl.h


class _Part(ctypes.Structure):
    """A struct iovec."""

    _fields_ = (("start", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def widen(pipe: int) -> None:
    """Let a pipe hold more: large tensors then pass in fewer turns. Without effect where it cannot be."""
    _fcntl(pipe, F_SETPIPE_SZ, PIPE_BYTES)


def write(pipe: int, content: memoryview) -> None:
    """Write all of it; it may change once this returns. Raises OSError."""
    if not content.readonly and content.nbytes > 2 * (held := _fcntl(pipe, F_GETPIPE_SZ)) > 0:
        content = content[_lend(pipe, content[:-held]) :]
    while content.nbytes:
        content = content[os.write(pipe, content) :]


def read_into(pipe: Any, place: memoryview) -> int:
    """Fill `place`; the number of bytes that came, fewer where the pipe ended. Raises OSError."""
    filled = 0
    while filled < place.nbytes and (count := pipe.readinto(place[filled:])):
        filled += count
    return filled


def _lend(pipe: int, content: memoryview) -> int:
    """Let the pipe have the pages themselves; the number of bytes, fewer where the system has no more of it.

    The pages are their owner's again once as much as the pipe holds has been written after them: what is in a pipe
    leaves it in turn.
    """
    try:
        vmsplice = ctypes.CDLL(None, use_errno=True).vmsplice
    except (AttributeError, OSError, TypeError):
        return 0
    vmsplice.argtypes = (ctypes.c_int, ctypes.POINTER(_Part), ctypes.c_size_t, ctypes.c_uint)
    vmsplice.restype = ctypes.c_ssize_t
    start, lent = ctypes.addressof(ctypes.c_char.from_buffer(content)), 0
    while lent < content.nbytes:
        count = vmsplice(pipe, ctypes.byref(_Part(start + lent, content.nbytes - lent)), 1, 0)
        if count <= 0:
            break  # whoever writes the rest sees why, if that fails too
        lent += count
    return lent


def _fcntl(pipe: int, command: int, value: int = 0) -> int:
    """What the system answers; 0 where it does not know the command, or this is no pipe."""
    try:
        import fcntl

        return fcntl.fcntl(pipe, command, value)
    except (ImportError, OSError):
        return 0
