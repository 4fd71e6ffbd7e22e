"""What the fuzz tests share: JSON and bytes to try, and a guard around what reads them.

Bounded in `nox -s tests` (hypothesis' default of 100 cases a test), minutes in `nox -s fuzz`
(--hypothesis-profile=fuzz, registered in conftest.py).
"""

from __future__ import annotations

import json
import os
import pathlib
import struct
import sys
import sysconfig
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy  # noqa: F401  what reading imports is no part of what it allocates
import safetensors  # noqa: F401
import torch  # noqa: F401
import transformers.models.auto.configuration_auto  # noqa: F401
from hypothesis import HealthCheck
from hypothesis import strategies as st
from polyquant.errors import PolyquantError

SETTINGS = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}
INSTALLED = tuple({sys.prefix, sys.base_prefix, *(sysconfig.get_path(name) for name in ("purelib", "platlib"))})
OWN_CODE = (str(Path(__file__).parent.parent), "/proc", "/sys", "/dev", "/usr/share/zoneinfo")
LONGEST = 5.0
BASE_BYTES, AMPLIFICATION = 2**20, 200  # a JSON value of three bytes becomes an object of some hundred

EXTREMES = [0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30]
NUMBERS = st.one_of(st.integers(-3, 64), st.sampled_from(EXTREMES), st.floats(allow_nan=False, allow_infinity=False))
TEXTS = st.one_of(
    st.sampled_from(["", "a", "..", "../x", "/etc/passwd", "model.safetensors", "float16", "torch.int8", "*", "(", "\0", "😀"]),
    st.text(max_size=12),
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
RAW = st.one_of(
    st.binary(max_size=80),
    st.builds(lambda text, n: text * n, st.sampled_from([b"[", b'{"a":', b"[{", b'"', b"1"]), st.sampled_from([1, 1200, 60_000])),
    st.sampled_from([b"\xff", b'{"a": "\xff"}', b'"\\ud800"', b'{"\\ud83d": 1}', b"\xef\xbb\xbf{}", b"NaN", b"1e999", b"-0"]),
)  # fmt: skip


def mutated(seed):
    """`seed` (a dict) with some of its values, at any depth, replaced, removed or added."""

    @st.composite
    def strategy(draw):
        value = json.loads(json.dumps(seed))
        for _ in range(draw(st.integers(0, 3))):
            places = list(_places(value))
            holder, key = draw(st.sampled_from(places))
            what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
            if what == "replace":
                holder[key] = draw(VALUES)
            elif what == "add" and isinstance(holder, dict):
                holder[draw(TEXTS)] = draw(VALUES)
            elif what == "remove":
                del holder[key]
            if not value:
                break
        return value

    return strategy()


def _places(value):
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)) and value[key]:
            yield from _places(value[key])


def json_files(seed):
    """Bytes of a JSON file: near `seed`, anything, or no JSON at all."""
    text = st.one_of(mutated(seed), mutated(seed), VALUES).map(lambda value: json.dumps(value).encode())
    return st.one_of(text, text, damaged(text), RAW)


@st.composite
def damaged(draw, content):
    """The bytes of `content` with some overwritten, cut off, added, or a number in them made another."""
    data = bytearray(draw(content))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        what = draw(st.sampled_from(["byte", "number", "number", "cut", "add"]))
        if what == "byte" and data:
            data[at] = draw(st.integers(0, 255))
        elif what == "number":
            code, bits = draw(st.sampled_from([("<I", 32), ("<Q", 64), ("<B", 8)]))
            number = draw(st.one_of(st.sampled_from(EXTREMES), st.integers(0, 70))) % 2**bits
            data[at : at + bits // 8] = struct.pack(code, number)
        elif what == "cut":
            del data[at:]
        elif what == "add":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
    return bytes(data)


class _Opened:
    """The files that Python code opens while `folder` is set."""

    folder: Path | None = None
    outside: list[str] = []

    def __call__(self, event, arguments):
        if event != "open" or self.folder is None or not isinstance(arguments[0], (str, bytes)):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))  # the folder itself has no links
        if not path.startswith((str(self.folder), *INSTALLED, *OWN_CODE)):
            self.outside.append(path)


INTERNING = [
    tracemalloc.Filter(True, pathlib.__file__, number)
    for number, line in enumerate(Path(pathlib.__file__).read_text(encoding="utf-8").splitlines(), 1)
    if "sys.intern(" in line
]
"""Where pathlib lets the interpreter keep a name, in a table that doubles now and then: no part of what a file asks."""
OPENED = _Opened()
sys.addaudithook(OPENED)


@contextmanager
def guarded(folder, size):
    """Only polyquant's errors leave the block; it opens files in `folder` only, and allocates what `size` bytes may ask.

    size: bytes of the file that is read. It takes at most LONGEST seconds of this process.
    """
    OPENED.folder, OPENED.outside = Path(os.path.abspath(folder)), []
    tracemalloc.start()
    began = time.process_time()
    try:
        yield
    except PolyquantError as error:
        assert str(error)
    finally:
        seconds = time.process_time() - began
        _, peak = tracemalloc.get_traced_memory()
        most, held = BASE_BYTES + AMPLIFICATION * size, tracemalloc.take_snapshot() if peak > BASE_BYTES else None
        tracemalloc.stop()
        OPENED.folder = None
    assert not OPENED.outside, f"read outside of {folder}: {OPENED.outside}"
    assert seconds <= LONGEST, f"{seconds:.1f} s were spent on a file of {size} bytes"
    if held is not None:
        peak -= sum(each.size for each in held.filter_traces(INTERNING).statistics("lineno"))
        held = held.statistics("filename")[:3]
    assert peak <= most, f"{peak} bytes were allocated for a file of {size}; what is held: {held}"
