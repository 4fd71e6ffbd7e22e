"""Candidates: a backend with options, or a checkpoint, as people write them: `bitsandbytes:nf4,double_quant=true`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import structs

from polyquant.errors import ConfigError
from polyquant.options import BackendOptions, convert
from polyquant.registry.written import SYNTAX, preset_and_pairs, preset_options, typed
from polyquant.types import BackendInfo, Record

EMULATED = "emulate_activations"
"""An option of the load, and of any candidate."""
DENSE = "dense"
"""Stands for no backend: the model as it is, in the compute dtype of the options."""


class DenseOptions(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The one option of the dense model is its compute dtype."""


class Candidate(Record, frozen=True):
    """One way to have a model quantized."""

    name: str  # as it was asked for; tables and reports show it
    backend: str  # empty: the checkpoint `model` names its own
    options: Mapping[str, Any] = {}
    model: str = ""  # a checkpoint of its own instead of the model that all candidates share

    @property
    def emulated(self) -> bool:
        """Whether its activations are rounded in software."""
        return bool(self.options.get(EMULATED))

    @property
    def label(self) -> str:
        """The name as tables, plots and reports show it: with a word on what is emulated."""
        return f"{self.name} (activations emulated)" if self.emulated and EMULATED not in self.name else self.name


def parse(text: str, card: Callable[[str], BackendInfo]) -> Candidate:
    """The candidate that `text` stands for.

    text: `backend:preset`, `backend:option=value,...` or both; `backend` alone is its first preset, and named so;
        `dense` or `dense:bfloat16`; a checkpoint that is quantized already as its path, or as `backend@path` with the
        backend that is to read it. A word without = goes on with the value before it: `gptq:skip=layers.0,lm_head`.
    card: finds the card of a backend. Raises ConfigError, or what `card` raises for an unknown backend.
    """
    head, colon, rest = text.partition(":")
    backend, at, model = head.partition("@")
    if not at and ("/" in head or head.endswith(".gguf")):
        backend, model = "", head
    if not (backend or model) or (at and not model) or (colon and not rest):
        raise ConfigError(f"{text!r} is no candidate; one is written as {SYNTAX}")
    preset, given = preset_and_pairs(text, rest)
    if backend == DENSE:
        if _loading(given):
            raise ConfigError(f"{text!r}: the dense model rounds no activations: leave {EMULATED} out")
        return _dense(text, preset, given)
    if not backend:
        if colon:
            raise ConfigError(f"{text!r}: name the backend that is to read the checkpoint, as in gptq@{model}:{rest}")
        return Candidate(name=text, backend="", model=model)
    return of_backend(card(backend), preset, given, model=model, name=text if rest or model else "", strict=False)


def of_backend(
    info: BackendInfo, preset: str, given: Mapping[str, object], *, model: str = "", name: str = "", strict: bool = True
) -> Candidate:
    """A backend's preset, if one is named, with the options given on top; its first preset where nothing is given.

    name: else it is as `parse` reads it. strict: see `convert`. Raises ConfigError for a preset that the backend does
    not have, and for options that are not allowed.
    """
    own = dict(given)
    how = _loading(own)
    if not (preset or own or model):
        preset = next(iter(info.presets), "")
    options = {**preset_options(info, preset), **typed(info, own, strict=strict), **how}
    words = ",".join([preset] * bool(preset) + [f"{option}={value}" for option, value in given.items()])
    usual = f"{info.name}@{model}" if model else info.name
    return Candidate(
        name=name or (f"{usual}:{words}" if words else usual), backend=info.name, options=options, model=model
    )


def with_emulation(candidate: Candidate) -> Candidate:
    """The candidate with its activations rounded in software, named so; the dense model as it is: it rounds none."""
    if candidate.backend == DENSE or candidate.emulated:
        return candidate
    sign = "," if ":" in candidate.name else ":"
    name = f"{candidate.name}{sign}{EMULATED}=true" if candidate.backend else candidate.name
    return structs.replace(candidate, name=name, options={**candidate.options, EMULATED: True})


def _loading(given: dict[str, Any]) -> dict[str, Any]:
    """Options of the load among those of a candidate, taken out of them. Raises ConfigError for no true or false."""
    if EMULATED not in given:
        return {}
    value = given.pop(EMULATED)
    if str(value).lower() not in ("true", "false"):
        raise ConfigError(f"{EMULATED} is true or false, got {value!r}")
    return {EMULATED: True} if str(value).lower() == "true" else {}


def presets_of(info: BackendInfo) -> list[Candidate]:
    """A candidate for each preset of a backend; one without options where it has none."""
    return [of_backend(info, preset, {}) for preset in info.presets or ("",)]


def _dense(text: str, preset: str, given: Mapping[str, object]) -> Candidate:
    dtype = {"compute_dtype": preset} if preset else {}
    options = convert(DenseOptions, {**dtype, **given})
    chosen = "float32" if options.compute_dtype == "auto" else options.compute_dtype
    return Candidate(name=text, backend=DENSE, options={"compute_dtype": chosen})
