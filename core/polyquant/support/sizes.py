"""Bytes as people read and write them."""

from __future__ import annotations

import re

from polyquant.errors import ConfigError

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float | None) -> str:
    """Bytes for people: 12.3 MiB."""
    if count is None:
        return "not measured"
    value = float(count)
    for unit in UNITS[:-1]:
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {UNITS[-1]}"


def parse_size(text: int | str) -> int:
    """Bytes: a number, or text such as 6GiB, 1.5TiB or 500MB. Raises ConfigError for anything else."""
    written = re.fullmatch(r"(\d+(?:\.\d+)?) ?(|[KMGT]i?B|B)", str(text).strip(), re.IGNORECASE)
    if written is None:
        raise ConfigError(f"a size is written as 6GiB, 500MB, or a number of bytes, got {text!r}")
    number, unit = written.groups()
    base = 1024 if "i" in unit.lower() else 1000
    count = int(float(number) * base ** ("KMGT".find(unit[:1].upper()) + 1 if unit else 0))
    if count <= 0:
        raise ConfigError(f"a size must be more than zero bytes, got {text!r}")
    return count
