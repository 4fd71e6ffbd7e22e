"""Files of options that users write: TOML, JSON, YAML."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from polyquant.errors import ConfigError


def read_table(
    path: Path, kind: str = "", *, holding: str = "options with their values, as in `rank: 16`"
) -> dict[str, Any]:
    """What a file holds. kind: toml, json or yaml; left out, the end of its name says it. holding: what it is to hold.

    Raises ConfigError for a file that cannot be read, or is something else.
    """
    kind = kind or path.suffix.lower().removeprefix(".")
    try:
        content = _parsed(path.read_text(encoding="utf-8"), kind)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no {kind.upper()}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold {holding}; it holds {type(content).__name__}")
    return content


def _parsed(text: str, kind: str) -> Any:
    """Raises ValueError, or one of its kind, for what is not of that kind."""
    if kind == "toml":
        return tomllib.loads(text)
    if kind == "json":
        return msgspec.json.decode(text)
    if kind not in ("yaml", "yml"):
        raise ConfigError(f"such a file ends in .yaml, .json or .toml, got .{kind}")
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error
