"""What an adapter's config may ask of PEFT: read and held to bounds before PEFT reads it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from polyquant.errors import AdapterError, ModelError
from polyquant.models.checks import COUNTED, read_object
from polyquant.models.headers import read_safetensors
from polyquant.models.patterns import unbounded

CONFIG = "adapter_config.json"
KIND = "LORA"
IMPORTED = ("megatron_config", "megatron_core")
"""Keys by which PEFT imports a module that the adapter names."""
DEFAULT_CORE = "megatron.core"  # which every adapter names, and nothing imports without megatron_config
SPARE_RANK = 16  # times the greatest rank that is stored


def require_bounded(folder: Path, weights: Path) -> None:
    """Raises AdapterError for an adapter that is no LoRA, or that would take PEFT for ever, or all memory, to put on.

    weights: the safetensors file in its folder.
    """
    asked = _read(folder)
    try:
        shapes = {name: tensor.shape for name, tensor in read_safetensors(weights).items()}
    except ModelError as error:
        raise AdapterError(f"{folder}: {weights.name} is damaged ({error}); fetch it again") from error
    if (kind := asked.get("peft_type")) != KIND:
        raise AdapterError(
            f"{folder} is a {kind} adapter of PEFT's, and LoRA (DoRA and rsLoRA among it) is what goes on a quantized "
            "base: train one with polyquant finetune, or put this one on the dense model"
        )
    if asked.get(IMPORTED[0]) or asked.get(IMPORTED[1]) not in (None, DEFAULT_CORE):
        raise AdapterError(f"{folder}: it has {' and '.join(IMPORTED)}, by which PEFT imports a module that it names")
    if why := unbounded(asked):
        raise AdapterError(f"{folder}: its {CONFIG} cannot be used: {why}")
    _require_few_layers(asked.get("layer_replication"), folder)
    _require_ranks(asked, shapes, folder)


def require_addable(folders: Iterable[Path]) -> None:
    """Raises AdapterError for an adapter that brings whole modules: of those one can take the place."""
    for folder in folders:
        asked = _read(folder)
        whole = [name for name in ("modules_to_save", "trainable_token_indices") if asked.get(name)]
        if whole or asked.get("bias", "none") != "none":
            raise AdapterError(
                f"{folder} brings whole tensors ({', '.join(whole) or 'biases'}), which cannot be added to those of "
                "another adapter; load it alone"
            )


def _read(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / CONFIG, str(folder))
    except ModelError as error:
        raise AdapterError(str(error)) from error


def _require_few_layers(replicated: Any, folder: Path) -> None:
    most = COUNTED["layers"]
    try:
        layers = sum(max(int(end) - int(start), 0) for start, end in replicated or ())
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{folder}: layer_replication must be pairs of numbers, it is {replicated!r:.60}") from error
    if layers > most:
        raise AdapterError(f"{folder}: layer_replication makes {layers} layers; at most {most} are believed")


def _require_ranks(asked: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """PEFT makes matrices of the ranks in the config, and then finds that those stored have others."""
    ranks = asked.get("rank_pattern") or {}
    given = [asked.get("r", 8), *(ranks.values() if isinstance(ranks, dict) else [None])]
    if not all(isinstance(rank, int) and rank > 0 for rank in given):
        raise AdapterError(f"{folder}: r and rank_pattern must give ranks from 1, they give {given!r:.60}")
    held = max((min(shape) for name, shape in shapes.items() if "lora_" in name and len(shape) > 1), default=1)
    if max(given) > SPARE_RANK * held:
        raise AdapterError(f"{folder}: it asks for matrices of rank {max(given)}, and those that it holds have {held}")
