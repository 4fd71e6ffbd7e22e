"""Texts that a user names: a file, or a dataset that the library `datasets` finds."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyquant.errors import ConfigError
from polyquant.support.texts import evaluation_text

PACKAGED = "Jane Austen, Persuasion, chapters 1 to 12 (comes with polyquant)"


def named_text(name: str) -> tuple[str, str]:
    """What to call a text, and the text: of a UTF-8 file, or of a dataset (name, or name:split) whose rows have `text`.

    name: empty for the novel that comes with polyquant. Raises ConfigError.
    """
    if not name:
        return PACKAGED, evaluation_text()
    path = Path(name).expanduser()
    if path.is_file():
        return path.name, read_utf8(path)
    dataset, _, split = name.partition(":")
    rows = [row.get("text") for row in dataset_rows(dataset, split or "test")]
    texts = [text for text in rows if isinstance(text, str)]
    if not texts:
        raise ConfigError(f"the dataset {name} has no rows with a column 'text'")
    return name, "\n\n".join(texts)


def read_utf8(path: Path, what: str = "") -> str:
    """The text of a file. Raises ConfigError where it cannot be read; what: goes before its name there."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{what}{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}{path} is not UTF-8 (byte {error.start}); convert it first") from error


def dataset_rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a split of a dataset. Raises ConfigError where there is neither such a file nor such a dataset."""
    if Path(name).suffix or name.startswith((".", "/", "~")):
        raise ConfigError(f"no such file: {name}")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        message = f"{name} is no file, and `datasets`, which would look for it on the hub, is not installed"
        raise ConfigError(f"{message}: pip install datasets") from error
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise ConfigError(f"{name} is no file, and `datasets` cannot load it: {error}") from error
    yield from map(dict, rows)
