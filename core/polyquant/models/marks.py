"""What a checkpoint is, from its config, the files beside it and its headers: the one place that asks.

`marks.json` beside this file is written from the plugins' cards by `python docs/generate.py`, so that the marks of
backends that are not installed are known too. Kinds that no backend of ours reads are in `FOREIGN`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from polyquant.errors import ModelError
from polyquant.models.headers import Headers
from polyquant.types import Mark

PATH = Path(__file__).with_suffix(".json")
OWN_WORDS = ("quant_method", "load_in_4bit", "load_in_8bit")  # of a quantization_config that says what it is


class Foreign(NamedTuple):
    """A kind of checkpoint that no backend here reads."""

    title: str
    read_by: str  # what does, in words, with the distribution where there is one
    marks: tuple[Mark, ...] = ()


def _foreign(method: str, title: str, read_by: str, *tensors: tuple[str, ...]) -> dict[str, Foreign]:
    return {method: Foreign(title, read_by, tuple(Mark(method=method, tensors=words) for words in tensors))}


FOREIGN: Mapping[str, Foreign] = {
    **_foreign("exl3", "EXL3", "exllamav3 (pip install exllamav3)", ("trellis", "suh", "svh"), ("trellis", "su", "sv")),
    **_foreign("exl2", "EXL2", "exllamav2 (pip install exllamav2)", ("q_weight", "q_scale", "q_groups")),
    **_foreign("quip", "QuIP#", "quip-sharp (https://github.com/Cornell-RelaxML/quip-sharp)", ("Qidxs", "SU", "SV")),
    **_foreign("qtip", "QTIP", "qtip (https://github.com/Cornell-RelaxML/qtip)", ("trellis", "SU", "SV")),
    "nunchaku": Foreign(
        "SVDQuant of nunchaku, for models that make pictures",
        "nunchaku (https://github.com/nunchaku-ai/nunchaku)",
        (Mark(method="nunchaku", tensors=("qweight", "wscales", "proj_down", "proj_up")),
         Mark(method="nunchaku", tensors=("qweight", "wscales", "lora_down", "lora_up"))),
    ),
    "onebit": Foreign("OneBit", "OneBit (https://github.com/xuyuzhuang11/OneBit)"),
}  # fmt: skip
"""quant_method, or the name that stands for one -> what reads it."""
ALIASES = {"quip_sharp": "quip", "quip#": "quip", "svdquant": "nunchaku"}  # other spellings -> as FOREIGN has it


@cache
def known_marks() -> tuple[Mark, ...]:
    """The marks of every backend of this repository, installed or not."""
    return msgspec.json.decode(PATH.read_bytes(), type=tuple[Mark, ...])


def side_files() -> Mapping[str, str]:
    """Files beside config.json that hold a quantization config -> the method each stands for."""
    return {mark.file: mark.method for mark in known_marks() if mark.file}


def foreign(method: str) -> Foreign | None:
    """What is known of a method that no backend reads."""
    return FOREIGN.get(ALIASES.get(method.lower(), method.lower()))


def with_method(config: dict[str, Any], side_file: Callable[[str], dict[str, Any] | None]) -> dict[str, Any]:
    """`config` with a quantization_config that names its quant_method, where a mark tells which it is.

    side_file: what the file of that name beside config.json holds; None where there is none.
    Unchanged where quantization_config says it itself, and where no mark fits.
    """
    text = config.get("text_config") or {}
    own = config.get("quantization_config") or text.get("quantization_config") or {}
    if any(own.get(word) for word in OWN_WORDS):
        return config
    for mark in known_marks():
        stored = config.get(mark.key) if mark.key else None
        if isinstance(stored, dict) and set(mark.fields) <= set(stored):
            return config | {"quantization_config": {**stored, **own, "quant_method": mark.method}}
    if own:
        return config
    for file, method in side_files().items():
        if (stored := side_file(file)) is not None:
            return config | {"quantization_config": {"quant_method": method, **stored}}
    return config


def renamed(method: str, names: Iterable[str]) -> dict[str, str]:
    """Names of stored tensors -> what they are called in the model, where checkpoints of a method differ there."""
    rules = [rule for mark in known_marks() if mark.method == method for rule in mark.names.items()]
    found: dict[str, str] = {}
    for name in names if rules else ():
        to = name
        for pattern, instead in rules:
            to = re.sub(pattern, instead, to)
        if to != name:
            found[name] = to
    return found


def require_told(config: dict[str, Any], headers: Headers, name: str) -> dict[str, Any]:
    """`config`, held against the headers of the checkpoint's files; of a kind of `FOREIGN`, with its name.

    Raises ModelError for packed tensors of which no config says how they are to be read, and for a config of a method
    whose tensors are not there.
    """
    text = config.get("text_config") or {}
    own = config.get("quantization_config") or text.get("quantization_config") or {}
    if (method := own.get("quant_method")) is not None:
        marks = [mark for mark in known_marks() if mark.method == method and mark.headers]
        if marks and _fitting(marks, headers) is None:
            raise ModelError(
                f"{name}: its config says that it is quantized with {method!r}, and no layer in its files has "
                f"{' or '.join(_words(mark) for mark in marks)}; they hold {_shown(headers)}. Fetch the weights that "
                "belong to this config, or take out what it says of quantization to load a dense model"
            )
        return config
    if any(own.get(word) for word in OWN_WORDS):
        return config
    kinds = (*known_marks(), *(mark for kind in FOREIGN.values() for mark in kind.marks))
    if (mark := _fitting([mark for mark in kinds if mark.headers], headers)) is None:
        return config
    if mark.method in FOREIGN:
        return config | {"quantization_config": {**own, "quant_method": mark.method}}
    raise ModelError(
        f"{name}: its files hold what {mark.method} packs ({_words(mark)}), and its config does not say how that was "
        f"done; {_wanted(mark.method)}. Fetch the config.json that belongs to these weights"
    )


def _fitting(marks: Iterable[Mark], headers: Headers) -> Mark | None:
    """The first mark of which a module has all tensors, in files with its metadata."""
    modules: dict[str, set[str]] = defaultdict(set)  # last words of the tensors' names, alone and with the dtype
    for name, tensor in headers.tensors.items():
        module, _, word = name.rpartition(".")
        modules[module] |= {word, f"{word}:{tensor.dtype}"}
    kinds = {frozenset(words) for words in modules.values()}
    for mark in marks:
        said = all(value in ("", headers.metadata.get(key)) and key in headers.metadata
                   for key, value in mark.metadata.items())  # fmt: skip
        if said and (not mark.tensors or any(words.issuperset(mark.tensors) for words in kinds)):
            return mark
    return None


def _words(mark: Mark) -> str:
    tensors = [word.replace(":", " in ") for word in mark.tensors]
    return ", ".join([*tensors, *(f"{key} {value}".strip() for key, value in mark.metadata.items())])


def _wanted(method: str) -> str:
    """Where the config of a method is looked for."""
    marks = [mark for mark in known_marks() if mark.method == method]
    places = [f"{mark.key!r} with {' and '.join(mark.fields)}" for mark in marks if mark.key]
    places += [f"a file {mark.file}" for mark in marks if mark.file]
    return f"there is no quantization_config with quant_method {method!r}" + "".join(f", nor {one}" for one in places)


def _shown(headers: Headers) -> str:
    words = sorted({f"{name.rpartition('.')[2]} in {tensor.dtype}" for name, tensor in headers.tensors.items()})
    return ", ".join(words[:6]) + (f" and {len(words) - 6} more kinds of tensors" if len(words) > 6 else "")
