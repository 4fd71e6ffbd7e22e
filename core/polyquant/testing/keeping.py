"""Quantized checkpoints that the checks read, kept in polyquant's cache until what makes them changes.

Calibrating takes seconds for a tiny model and minutes for the real one. A kept checkpoint has a key of all that goes
into it, so that one made otherwise is never read: files of the dense model, options, calibration text, device, every
installed distribution with its version, and the sources of the core, the plugin and the test that makes it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from polyquant.support.cache import cache_folder
from polyquant.support.files import locked
from polyquant.testing.texts import CALIBRATION

UNUSED_SECONDS = 7 * 24 * 3600  # a checkpoint that nobody has read for so long goes when the next one is made
BLOCK_BYTES = 2**20
CODE = (".py", ".so", ".pyd")


def kept(backend: str, name: str, key: str, make: Callable[[Path], object]) -> Path:
    """The checkpoint `name` with this key: `make` writes it to a path that is not there yet, where none is kept.

    One process makes it while others wait for it. Raises what `make` raises; nothing is left then.
    """
    folder = cache_folder() / "conformance" / backend
    out = folder / f"{name}-{key}"
    if not out.exists():
        with locked(out):
            if not out.exists():
                _remove_unused(folder)
                with TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
                    made = Path(partial) / "checkpoint"
                    make(made)
                    made.rename(out)
    os.utime(out)
    return out


def key_of(
    model: Path, options: Mapping[str, object], device: str, *, plugin: str, maker: Callable[..., object] | None
) -> str:
    """The key of a checkpoint: 16 hexadecimal digits.

    model: folder or file of the dense model; plugin: the module that holds the plugin; maker: the function of a test
    that makes the checkpoint in place of the plugin's own hook: the modules in its folder count.
    """
    parts = [_digest(model), json.dumps(options, sort_keys=True, default=str), device, *CALIBRATION, _installed()]
    parts += [_sources(_home("polyquant")), _sources(_home(plugin.partition(".")[0]))]
    if maker is not None:
        parts.append(_sources(Path(inspect.getfile(maker)).parent))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _remove_unused(folder: Path) -> None:
    for old in folder.glob("*"):
        if old.stat().st_mtime < time.time() - UNUSED_SECONDS:
            shutil.rmtree(old) if old.is_dir() else old.unlink()


def _home(module: str) -> Path:
    """The folder of a package, the file of a plain module."""
    file = Path(inspect.getfile(sys.modules[module]))
    return file.parent if file.name == "__init__.py" else file


@cache
def _digest(path: Path) -> str:
    """Of a file, or of all files below a folder with their names."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return _digest_of(files, path)


@cache
def _sources(path: Path) -> str:
    """Of a module's file, or of the modules and binaries of a package; what only tests is left out."""
    files = path.rglob("*") if path.is_dir() else (path,)
    checks = Path(__file__).parent
    return _digest_of(sorted(file for file in files if file.suffix in CODE and checks not in file.parents), path)


def _digest_of(files: Iterable[Path], below: Path) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(str(file.relative_to(below)).encode())
        with file.open("rb") as content:
            while block := content.read(BLOCK_BYTES):
                found.update(block)
    return found.hexdigest()


@cache
def _installed() -> str:
    """Every distribution with its version: a library's helpers change what it makes too."""
    there = {f"{each.name}=={each.version}" for each in importlib.metadata.distributions()}
    return "\n".join([sys.version, *sorted(there)])
