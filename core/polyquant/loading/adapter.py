"""Adapter folders: plain PEFT, with a card beside it; and adapters on a loaded model. Imports torch where it loads."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from polyquant.errors import AdapterError, PolyquantError
from polyquant.loaded import LoadedModel
from polyquant.loading.adapter_config import CONFIG, require_addable, require_bounded
from polyquant.memory.adapted import MARK, base_name
from polyquant.models.hashing import content_hash
from polyquant.models.resolve import refusal
from polyquant.support.peft import import_peft
from polyquant.types import UNREADABLE, Capabilities, Record

PREFIX = "base_model.model."  # of the names of tensors, before the base's own
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
INPUTS, OUTPUTS = ("in_features", "embedding_dim"), ("out_features", "num_embeddings")
SIZES: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    "A.weight": {1: INPUTS}, "B.weight": {0: OUTPUTS}, "weight": {0: OUTPUTS, 1: INPUTS},
    "embedding_A": {1: OUTPUTS}, "embedding_B": {0: INPUTS},
}  # fmt: skip
"""The end of a tensor's name -> axis -> the attributes of a module, one of which is its length."""
CARD, WEIGHTS = "polyquant.json", "adapter_model.safetensors"


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


def located(adapter: str) -> Path:
    """The folder of an adapter: a local one, or a hub repository's in the hub's cache, downloaded first.

    Raises AdapterError where there is none, or one of another kind than LoRA.
    """
    folder = Path(adapter).expanduser()
    if not folder.exists() and HUB_NAME.fullmatch(adapter):
        folder = _from_hub(adapter)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        there = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise AdapterError(f"{adapter} is no adapter: {', '.join(missing)} missing; there is {there}")
    require_bounded(folder, folder / WEIGHTS)
    return folder


def require(adapters: Sequence[str], capabilities: Capabilities) -> list[Path]:
    """The folders of adapters. Raises AdapterError where a backend that can this takes none, or one is no adapter."""
    if not adapters:
        return []
    if not capabilities.runs_on_torch:
        raise AdapterError("this backend does not run PyTorch modules, and PEFT adapters are such")
    folders = [located(adapter) for adapter in adapters]
    if len(folders) > 1:
        require_addable(folders)
    return folders


def attach(loaded: LoadedModel, adapters: Sequence[str], folders: Sequence[Path]) -> LoadedModel:
    """Put adapters on `loaded`, in place, in eval mode; what differs from training is noted.

    adapters: as they were asked for; folders: what `require` found of them. The products of several are added up.
    Raises AdapterError where one does not fit the model.
    """
    for folder in folders:
        card = read_card(folder)
        if card is not None:
            loaded.notes += _differences(card, loaded)
        _require_fit(loaded.model, folder)
    loaded.model = attach_to(loaded.model, *folders)
    loaded.adapter = ", ".join(adapters)
    return loaded


def attach_to(model: Any, *folders: Path) -> Any:
    """`model` with adapters, as PEFT wraps it, in eval mode; of several all are active, under their numbers from 0.

    Raises AdapterError where PEFT cannot.
    """
    from polyquant.plugin.adapters import guard

    peft = import_peft()
    guard()
    first, *others = folders
    at = first
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # merging unties what it changes
            if not others:
                return peft.PeftModel.from_pretrained(
                    model, str(first), is_trainable=False, trust_remote_code=False
                ).eval()
            wrapped = peft.PeftModel.from_pretrained(
                model, str(first), adapter_name="0", is_trainable=False, trust_remote_code=False
            )
            for number, at in enumerate(others, 1):
                wrapped.load_adapter(str(at), adapter_name=str(number), is_trainable=False)
            wrapped.base_model.set_adapter([str(number) for number in range(len(folders))])
            return wrapped.requires_grad_(requires_grad=False).eval()
    except PolyquantError as error:
        raise AdapterError(f"{at}: {error}") from error
    except Exception as error:
        raise AdapterError(f"{at}: PEFT cannot put this adapter on the model: {error}") from error


def _from_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    from polyquant.models import versions

    try:
        with versions.progress_bars(enabled=False):
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, CARD]))
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        raise AdapterError(str(refusal(name, error))) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise AdapterError(
            f"{name}: no such folder here, not in the hub's cache, and the hub cannot be reached "
            f"({type(error).__name__}); give the adapter's folder, or unset HF_HUB_OFFLINE and check the network"
        ) from error


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
    """Raises AdapterError, by name, where a tensor of an adapter has no module here or another size."""
    modules, vocabulary = dict(model.named_modules()), (model.get_input_embeddings(), model.get_output_embeddings())
    for name, shape in _shapes(folder).items():
        path, lora, part = _parts(name)
        if (sizes := SIZES.get(part)) is None:
            continue
        module = modules.get(path)
        if module is None or (lora and not hasattr(module, "in_features") and not hasattr(module, "num_embeddings")):
            raise AdapterError(f"{folder}: it adapts {path}, which this model does not have")
        if lora and len(shape) != 2:
            raise AdapterError(f"{folder}: {name} must be a matrix, its shape is {tuple(shape)}")
        for axis, attributes in sizes.items():
            wanted = next((getattr(module, each) for each in attributes if hasattr(module, each)), None)
            if wanted is None or len(shape) <= axis or shape[axis] == wanted:
                continue
            if module in vocabulary and attributes != INPUTS:
                raise AdapterError(_other_vocabulary(folder, shape[axis], wanted))
            side = "inputs" if attributes == INPUTS else "outputs"
            raise AdapterError(f"{folder}: it adapts {path} with {shape[axis]} {side}, and the module has {wanted}")


def _other_vocabulary(folder: Path, trained: int, here: int) -> str:
    apart = f"{abs(trained - here)} {'more' if trained > here else 'fewer'}"
    cure = (
        "give the dense model the same tokens (the adapter's tokenizer, and "
        f"model.resize_token_embeddings({trained})), save both in a folder, and load that"
        if trained > here
        else "load the model as it was when the adapter was trained, before tokens were added"
    )
    return (
        f"{folder}: it was trained with a vocabulary of {trained} tokens, {apart} than the {here} of this model; {cure}"
    )


def adapted_modules(folder: Path) -> set[str]:
    """Names of the base's modules that the adapter in `folder` has a product for, or a copy of that was trained."""
    return {_parts(name)[0] for name in _shapes(folder) if "token_adapter" not in name}


def _parts(name: str) -> tuple[str, str, str]:
    """Of a tensor in an adapter's file: the base's module, LoRA's mark where it is a product's, and the rest."""
    path, lora, part = name.removeprefix(PREFIX).partition(f".{MARK}")
    if lora:
        return path, lora, part
    module, _, part = base_name(path.replace(".modules_to_save.", ".")).rpartition(".")
    return module, lora, part


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor name -> shape. Raises AdapterError where the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{folder}: {WEIGHTS} is damaged ({error}); fetch it again") from error
