"""The file of `polyquant finetune --config`: YAML, JSON or TOML, with polyquant's names or those of TRL's SFTConfig."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from polyquant.cli.tables import read_table
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


class Arguments(msgspec.Struct, frozen=True):
    """What the command takes beside the options of loading and training."""

    model: str = ""
    data: str = ""
    out: str = ""
    backend: str | None = None
    revision: str | None = None
    overwrite: bool = False
    restart: bool = False


def read_training_file(path: Path, known: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Option -> value, by polyquant's names; and option -> the field as the file has it.

    known: the options there are. Raises ConfigError for a file that cannot be read, for an unknown field, with the
    nearest name, and for two fields that are one option.
    """
    found: dict[str, Any] = {}
    fields: dict[str, str] = {}
    for field, value in read_table(path).items():
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
        backend = read_table(path).get("backend")
    except ConfigError:
        return None
    return backend if isinstance(backend, str) else None
