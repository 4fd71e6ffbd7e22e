"""Writes what the docs derive from the code: the backend table. `--check` only says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

import polyquant
from polyquant.cli.show import card_cells

ROOT = Path(__file__).parent.parent
START, END = "<!-- backends:", "<!-- end of backends -->"
HEADINGS = ("backend", "bits", "schemes", "devices", "reads checkpoints of", "can", "tested with")


def backend_table(folder: Path = ROOT / "plugins") -> str:
    """A Markdown table of the backends of this repository."""
    ours = {path.parent.name for path in folder.glob("*/pyproject.toml")}
    rows = [HEADINGS, ("---",) * len(HEADINGS)]
    for info in polyquant.backends():
        if info.name in ours:
            libraries = ", ".join(f"{library.distribution} {library.versions}".strip() for library in info.libraries)
            name, *cells = card_cells(info)
            rows.append((f"[{name}](plugins/{name}/README.md)", *cells, libraries))
    return "\n".join(f"| {' | '.join(cell or '-' for cell in row)} |" for row in rows)


def with_table(readme: str) -> str:
    """The README's text with the table between its markers renewed."""
    head, rest = readme.split(START, 1)
    marker, _, rest = rest.partition("\n")
    _, tail = rest.split(END, 1)
    return f"{head}{START}{marker}\n{backend_table()}\n{END}{tail}"


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    renewed = with_table(text)
    if "--check" in sys.argv:
        sys.exit(text != renewed)
    path.write_text(renewed, encoding="utf-8")


if __name__ == "__main__":
    main()
