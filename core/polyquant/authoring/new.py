"""A complete backend package to start from: the template beside this file, under another name.

The template is a working backend called rowwise (8 bit, rounded to nearest, one scale for each output row), so it is
linted, type-checked and tested like the rest; only its names change.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection
from pathlib import Path

from polyquant.errors import ConfigError, SaveError
from polyquant.registry.catalogue import names_taken
from polyquant.support.files import atomic_folder

TEMPLATE = Path(__file__).parent / "template"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST_NAME = 40
OWN = {"polyquant", "dense"}
"""polyquant's own words."""


def package_of(name: str) -> str:
    """The import package of a backend: polyquant_acme_4bit for acme-4bit."""
    return f"polyquant_{name.replace('-', '_')}"


def check_name(name: str, installed: Collection[str] = ()) -> None:
    """Raises ConfigError where no new backend can have this name: not valid for pip and Python, or taken.

    installed: names of backends that are.
    """
    if not NAME.fullmatch(name) or name.startswith("polyquant-") or len(name) > LONGEST_NAME:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("polyquant")).strip("-0123456789")
        hint = f" Did you mean {plain!r}?" if NAME.fullmatch(plain[:LONGEST_NAME]) and plain != name else ""
        raise ConfigError(
            f"{name!r} is no name for a backend: lower-case letters and digits in words joined by '-', the first a "
            f"letter, at most {LONGEST_NAME} characters, without 'polyquant' in front.{hint}"
        )
    if name in installed:
        raise ConfigError(f"a backend called {name!r} is installed already; choose another name, or uninstall it first")
    if name in OWN | names_taken():
        raise ConfigError(f"{name!r} is taken: polyquant knows it already; choose another name")
    if importlib.util.find_spec(package_of(name)):
        raise ConfigError(f"a package {package_of(name)} is installed already; choose another name")


def new_backend(name: str, out: Path) -> list[Path]:
    """Write the package of a backend called `name` into the new folder `out`, all or nothing; gives its files.

    Raises ConfigError for a name that is not valid, SaveError where `out` exists or cannot be written.
    """
    if out.exists():
        raise SaveError(f"{out} exists; choose another folder (--out DIR), or remove it")
    names = {
        "polyquant_rowwise": package_of(name),
        "Rowwise": "".join(part.capitalize() for part in name.split("-")),
        "rowwise": name,
    }
    each = re.compile("|".join(names))

    def renamed(text: str) -> str:
        return each.sub(lambda found: names[found[0]], text)

    with atomic_folder(out, overwrite=False, marked=False) as partial:
        for path in template_files():
            target = partial / renamed(path.relative_to(TEMPLATE).as_posix())
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(renamed(path.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
    return sorted(path for path in out.rglob("*") if path.is_file())


def template_files() -> list[Path]:
    """The template as it was written, without what Python and pip leave in its folders."""
    return sorted(path for path in TEMPLATE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
