"""Bytes as people read and write them."""

from __future__ import annotations

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
    """Bytes: a number, or text such as 6GiB or 500MB, as accelerate reads it. Raises ConfigError for anything else."""
    from accelerate.utils import convert_file_size_to_int

    written = text.strip().replace(" ", "") if isinstance(text, str) else text
    try:
        count = int(written) if isinstance(written, int) or written.isdigit() else convert_file_size_to_int(written)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"a size is written as 6GiB, 500MB, or a number of bytes, got {text!r}") from error
    if count <= 0:
        raise ConfigError(f"a size must be more than zero bytes, got {text!r}")
    return count
