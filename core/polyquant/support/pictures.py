"""Pictures as files, drawn with matplotlib, which is imported where one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polyquant.errors import ConfigError, EnvironmentProblem
from polyquant.support.libraries import installed_version

SUFFIXES = (".svg", ".png", ".pdf")


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure of so many inches, belonging to no window. Raises EnvironmentProblem without matplotlib."""
    if installed_version("matplotlib") is None:
        raise EnvironmentProblem(
            "pictures are drawn with matplotlib, which is not installed; run: pip install matplotlib"
        )
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def require_suffix(path: Path, *more: str) -> None:
    """Raises ConfigError for a file that is no picture. more: suffixes that are allowed besides."""
    allowed = (*SUFFIXES, *more)
    if path.suffix not in allowed:
        raise ConfigError(f"a picture is written as {', '.join(allowed)}, got {path.name!r}")


def save(figure: Any, path: Path) -> Path:
    """Write the figure in the format of the file's name; the same figure gives the same bytes."""
    from matplotlib import rc_context

    dated = {"Date": None} if path.suffix == ".svg" else {"CreationDate": None} if path.suffix == ".pdf" else {}
    with rc_context({"svg.hashsalt": "polyquant", "svg.fonttype": "none"}):
        figure.savefig(path, format=path.suffix.removeprefix("."), metadata=dated, dpi=200)
    return path
