"""The file of `polyquant finetune --config`: YAML, JSON or TOML, with polyquant's names or those of TRL's SFTConfig."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from polyquant.errors import ConfigError, did_you_mean

TRL = {
    "model_name_or_path": "model", "model_revision": "revision", "dataset_name": "data", "output_dir": "out",
    "overwrite_output_dir": "overwrite", "attn_implementation": "attention", "num_train_epochs": "epochs",
    "max_steps": "steps", "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "accumulation",
    "max_grad_norm": "gradient_clip", "lr_scheduler_type": "schedule", "warmup_ratio": "warmup", "optim": "optimizer",
    "max_seq_length": "max_length", "completion_only_loss": "completion_only", "save_steps": "checkpoint_every",
    "lora_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_target_modules": "targets",
    "use_rslora": "rslora", "use_dora": "dora",
}  # fmt: skip
"""A field of TRL's SFTConfig or ModelConfig, or of TrainingArguments -> the option here, where names differ."""
ARGUMENTS = ("model", "data", "out", "backend", "revision", "overwrite", "restart")
"""What the command takes beside the options of loading and training."""


def read_training_file(path: Path, known: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Option -> value, by polyquant's names; and option -> the field as the file has it.

    known: the options there are. Raises ConfigError for a file that cannot be read, for an unknown field, with the
    nearest name, and for two fields that are one option.
    """
    found: dict[str, Any] = {}
    fields: dict[str, str] = {}
    for field, value in _content(path).items():
        option = TRL.get(field, str(field).replace("-", "_"))
        if option not in known:
            names = [*known, *TRL]
            raise ConfigError(
                f"{path} has {field!r}, which is no option; there are {', '.join(sorted(known))}, and TRL's names "
                f"for them.{did_you_mean(str(field), names)}"
            )
        if option in found:
            raise ConfigError(f"{path} has {fields[option]} and {field}, which are one option: leave one out")
        found[option], fields[option] = value, str(field)
    if found.get("steps") == -1:  # as transformers writes that epochs count
        del found["steps"]
    return found, fields


def backend_in(path: Path) -> str | None:
    """The backend that a file names; None where it names none, or cannot be read, which the command then says."""
    try:
        backend = _content(path).get("backend")
    except ConfigError:
        return None
    return backend if isinstance(backend, str) else None


def _content(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    kind = path.suffix.lower().removeprefix(".")
    try:
        content = _parsed(text, kind)
    except (tomllib.TOMLDecodeError, msgspec.DecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is no {kind.upper()}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} must hold options with their values, as in `rank: 16`; it holds {type(content).__name__}"
        )
    return content


def _parsed(text: str, kind: str) -> Any:
    """Raises ValueError for what is not of that kind."""
    if kind == "toml":
        return tomllib.loads(text)
    if kind == "json":
        return msgspec.json.decode(text)
    if kind not in ("yaml", "yml"):
        raise ConfigError(f"a file of options ends in .yaml, .json or .toml, got .{kind}")
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error
