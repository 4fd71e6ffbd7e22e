"""Adapter folders: plain PEFT, with a card beside it; and adapters on a loaded model. Imports torch where it loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from polyquant.errors import AdapterError
from polyquant.loaded import LoadedModel
from polyquant.loading.adapter_config import require_bounded
from polyquant.models.hashing import content_hash
from polyquant.support.peft import import_peft
from polyquant.types import UNREADABLE, Record

CARD, CONFIG, WEIGHTS = "polyquant.json", "adapter_config.json", "adapter_model.safetensors"


class Card(Record, frozen=True):
    """What an adapter was trained on: `polyquant.json` in its folder. PEFT's own files do not need it."""

    base_model: str
    base_hash: str  # of the base's config and weight files
    architecture: str
    backend: str
    backend_options: dict[str, object]
    training: Mapping[str, Any]  # the options of the run: `polyquant.finetuning.options.TrainingOptions`
    data_hash: str
    examples: int
    versions: dict[str, str]


def read_card(folder: Path) -> Card | None:
    """The card of an adapter; None where it was not made here. Raises AdapterError for one that is unreadable."""
    path = folder / CARD
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Card)
    except UNREADABLE as error:
        raise AdapterError(f"{path} is unreadable ({error}); delete it to load the adapter without a card") from error


def attach(loaded: LoadedModel, folder: str | Path) -> LoadedModel:
    """Put the adapter in `folder` on `loaded`, in place, in eval mode; what differs from its training is noted.

    Raises AdapterError where the folder holds none, or one that does not fit the model.
    """
    folder = Path(folder)
    _require_adapter(folder)
    if not loaded.backend.capabilities.runs_on_torch:
        raise AdapterError(f"{loaded.backend.name} does not run PyTorch modules, and PEFT adapters are such")
    card = read_card(folder)
    if card is not None:
        loaded.notes += _differences(card, loaded)
    _require_fit(loaded.model, folder)
    loaded.model = attach_to(loaded.model, folder)
    loaded.adapter = str(folder)
    return loaded


def attach_to(model: Any, folder: Path) -> Any:
    """`model` with the adapter, as PEFT wraps it. Raises AdapterError where PEFT cannot."""
    try:
        peft = import_peft()
        adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=False, trust_remote_code=False)
        return adapted.eval()
    except Exception as error:
        raise AdapterError(f"{folder}: PEFT cannot put this adapter on the model: {error}") from error


def _require_adapter(folder: Path) -> None:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        there = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise AdapterError(f"{folder} is no adapter: {', '.join(missing)} missing; there is {there}")
    require_bounded(folder / CONFIG, folder / WEIGHTS)


def _differences(card: Card, loaded: LoadedModel) -> list[str]:
    """What a user should know where the adapter was trained on something else. Raises AdapterError for another kind."""
    architecture = type(loaded.model).__name__
    if card.architecture != architecture:
        raise AdapterError(f"the adapter was trained on a {card.architecture}, and this model is a {architecture}")
    notes = []
    if card.backend != loaded.backend.name:
        notes.append(
            f"the adapter was trained on {card.backend}, and runs on {loaded.backend.name}: outputs differ as the "
            "bases do"
        )
    elif card.backend_options != msgspec.to_builtins(loaded.config):
        notes.append("the adapter was trained with other options of this backend: outputs differ as the bases do")
    if loaded.request and content_hash(loaded.request.source) != card.base_hash:
        notes.append(f"the adapter was trained on the files of {card.base_model}, and these are others")
    return notes


def _require_fit(model: Any, folder: Path) -> None:
    """Raises AdapterError, by name, where an adapter matrix has no module here or another size."""
    sizes = {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}
    for name, shape in _shapes(folder).items():
        path, _, which = name.removeprefix("base_model.model.").partition(".lora_")
        if which not in ("A.weight", "B.weight"):
            continue
        if path not in sizes:
            raise AdapterError(f"{folder}: it adapts {path}, which this model does not have")
        if len(shape) != 2:
            raise AdapterError(f"{folder}: {name} must be a matrix, its shape is {tuple(shape)}")
        wanted = sizes[path].in_features if which[0] == "A" else sizes[path].out_features
        if (found := shape[1] if which[0] == "A" else shape[0]) != wanted:
            side = "inputs" if which[0] == "A" else "outputs"
            raise AdapterError(f"{folder}: it adapts {path} with {found} {side}, and the module has {wanted}")


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor name -> shape. Raises AdapterError where the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{folder}: {WEIGHTS} is damaged ({error}); fetch it again") from error
