"""Backends and options as people write them: `gguf:Q8_0,compute_dtype=bfloat16`, and the words of a query.

A query asks for `bits` and `scheme` (`polyquant.backends(bits=4)`); every backend takes them as options too, whatever
its own are called. What they come to follows from its card, its presets and its options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from polyquant.errors import ConfigError, did_you_mean
from polyquant.options import BackendOptions, convert, describe_options
from polyquant.packable import PackableOptions
from polyquant.types import BackendInfo

SYNTAX = "backend (its first preset), backend:preset, backend:preset,option=value,... or backend@checkpoint"
QUERY_WORDS = ("bits", "scheme")
SMALL, IN_EIGHT = "small", {"embeddings": "8bit", "head": "8bit"}
"""A preset of every backend that rounds to 4 bits while loading, and what it adds to the first of those."""


def pairs(text: str, words: Sequence[str]) -> dict[str, str]:
    """name -> value of words written as name=value; one without = goes on with the value before it.

    text: the whole, for messages. Raises ConfigError for a name that is given twice, and a word that is neither.
    """
    found: dict[str, str] = {}
    last = ""
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            if name in found:
                raise ConfigError(f"{text!r} gives {name} twice")
            last = name.strip()
            found[last] = value.strip()
        elif last:
            found[last] += f",{word}"
        else:
            raise ConfigError(f"{text!r}: {word!r} is neither a preset nor name=value; a candidate is {SYNTAX}")
    return found


def preset_and_pairs(text: str, rest: str) -> tuple[str, dict[str, str]]:
    """The preset, empty where none is named, and the options of what follows the colon in `text`."""
    words = [word.strip() for word in rest.split(",") if word.strip()]
    preset = words.pop(0) if words and "=" not in words[0] else ""
    return preset, pairs(text, words)


def presets(info: BackendInfo) -> dict[str, Mapping[str, object]]:
    """The card's by name, and SMALL where it rounds while loading: the first of 4 bits, embedding and head in 8."""
    found = dict(info.presets)
    options = info.options
    packable = issubclass(options, PackableOptions) and not options.quantizes_vocabulary
    if info.capabilities.on_the_fly and packable:
        four = (each for each in info.presets.values() if convert(options, each).weight_bits == 4)
        if (first := next(four, None)) is not None:
            found.setdefault(SMALL, {**first, **IN_EIGHT})
    return found


def preset_options(info: BackendInfo, preset: str) -> Mapping[str, object]:
    """The options of a preset; none of the empty name. Raises ConfigError where the backend does not have it."""
    if not preset or preset in info.presets:
        return info.presets.get(preset, {})
    known = presets(info)  # which imports the plugin
    if preset not in known:
        words = ", ".join(known) or "none"
        raise ConfigError(
            f"{info.name} has no preset {preset!r}; there are {words}.{did_you_mean(preset, known)} "
            "Options are written as name=value"
        )
    return known[preset]


def named(backend: str, options: Mapping[str, Any], card: Callable[[str], BackendInfo]) -> tuple[str, dict[str, Any]]:
    """The backend of `name`, `name:preset` or `name:preset,option=value`, and its options, with `options` on top.

    card: finds the card of a backend. Raises ConfigError, or what `card` raises for an unknown backend.
    """
    name, colon, rest = backend.partition(":")
    if not colon:
        return backend, dict(options)
    info, (preset, given) = card(name), preset_and_pairs(backend, rest)
    return name, {**preset_options(info, preset), **typed(info, given, strict=False), **options}


def typed(info: BackendInfo, given: Mapping[str, object], *, strict: bool = True) -> dict[str, Any]:
    """`given` with values of the right types; words of a query stay. Raises ConfigError for one that is not allowed."""
    config = convert(info.options, resolved(info, given, strict=strict), strict=strict)
    return {name: getattr(config, name, value) for name, value in given.items()}


def words_of(info: BackendInfo) -> list[str]:
    """The words of a query that are no option of the backend's own, and stand for some."""
    return [word for word in QUERY_WORDS if word not in info.options.__struct_fields__]


def resolved(info: BackendInfo, given: Mapping[str, object], *, strict: bool = True) -> dict[str, object]:
    """`given` with the words of a query as the backend's own options, the fewest that `reaching` finds.

    Raises ConfigError, with the choices, where nothing that it has is so, or several values are.
    """
    words = {name: given[name] for name in words_of(info) if name in given}
    own = {name: value for name, value in given.items() if name not in words}
    if not words:
        return own
    found = reaching(info, words, own, strict=strict)
    if len(found) == 1:
        return found[0]
    formats = {name: value for name, value in own.items() if name not in info.options.load_time}
    asked = ", ".join(f"{name}={value}" for name, value in {**words, **formats}.items())
    if found:
        choices = " or ".join(
            ", ".join(f"{name}={value!r}" for name, value in each.items() if name not in own) for each in found
        )
        raise ConfigError(f"{asked} may be several of {info.name}'s: say which, {choices}")
    can, known = info.capabilities, ", ".join(presets(info)) or "none"
    if not formats and len(words) == 1 and _is_declared(info, *next(iter(words.items()))):
        said = f"reads checkpoints with {asked}, and none of its options makes one; presets are {known}"
        raise ConfigError(f"{info.name} {said}")
    raise ConfigError(
        f"{info.name} has nothing with {asked}; bits are {', '.join(f'{bits:g}' for bits in can.bits)}, schemes "
        f"{', '.join(can.schemes)}, presets {known}"
    )


def reaching(
    info: BackendInfo, words: Mapping[str, object], own: Mapping[str, object] = {}, *, strict: bool = True
) -> list[dict[str, object]]:
    """The options, `own` among them, that come to the words of a query.

    The backend's defaults, else its first preset that does, else every value of one option, else of two.
    Raises ConfigError where `own` is not allowed, whatever the words stand for.
    """
    tried, refusals = 0, list[ConfigError]()

    def fits(more: Mapping[str, object]) -> bool:
        nonlocal tried
        tried += 1
        try:
            config = convert(info.options, {**more, **own}, strict=strict)
        except ConfigError as error:
            refusals.append(error)
            return False
        return all(is_so(info, config, word, value) for word, value in words.items())

    for known in ({}, *info.presets.values()):
        if fits(known):
            return [{**known, **own}]
    values = [(name, value) for name, value in values_of(info) if name not in own]
    for count in (1, 2):
        sets = (dict(chosen) for chosen in combinations(values, count))
        if found := [{**known, **own} for known in sets if len(known) == count and fits(known)]:
            return found
    if len(refusals) == tried:
        raise refusals[0]
    return []


def _is_declared(info: BackendInfo, word: str, value: object) -> bool:
    """Whether the card has it, of which its options need not make any."""
    can = info.capabilities
    return str(value) in (map(str, can.schemes) if word == "scheme" else (f"{bits:g}" for bits in can.bits))


def is_so(info: BackendInfo, config: BackendOptions, word: str, value: object) -> bool:
    """Whether options have so many bits, or that scheme."""
    if word == "bits":
        try:
            return float(str(value)) == config.level_bits
        except ValueError:
            return False
    return str(value) in _schemes(info, config)


def told(info: BackendInfo, config: BackendOptions, word: str) -> str:
    """What options are, as a word of a query says it."""
    return f"{config.level_bits:g}" if word == "bits" else " or ".join(sorted(_schemes(info, config))) or "another"


def _schemes(info: BackendInfo, config: BackendOptions) -> set[str]:
    """What the card's schemes call these options: by their own word, else by a value; where there is one, that one."""
    values = {str(getattr(config, name)) for name in config.__struct_fields__}
    known = info.capabilities.schemes
    return {config.scheme} if config.scheme else values.intersection(known) or set(known if len(known) == 1 else ())


def values_of(info: BackendInfo) -> Iterator[tuple[str, object]]:
    """(option, value) of every value but the default of each option that has a list of them, or two.

    Not of those that say how a checkpoint is loaded, whatever it holds.
    """
    apart = {*BackendOptions.__struct_fields__, *info.options.load_time}
    for option in describe_options(info.options):
        if option.name not in apart and option.kind != "table":
            values = (True, False) if isinstance(option.default, bool) else option.values
            yield from ((option.name, value) for value in values if value != option.default)
