"""Checks of the options: strict, frozen, the same after every conversion. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from polyquant.errors import ConfigError
from polyquant.options import convert, describe_options
from polyquant.testing.check import check, expect
from polyquant.testing.subject import Subject


@check(per="backend")
def unknown_options_are_refused(subject: Subject) -> None:
    """A misspelt option is a ConfigError that names the nearest one."""
    for option in describe_options(subject.info.options):
        wrong = option.name + "_"
        message = _refusal(subject, {wrong: option.default})
        expect(message, f"the unknown option {wrong!r} was accepted")
        expect(option.name in message and "Did you mean" in message, f"no 'Did you mean' in {message!r}")


@check(per="backend")
def wrong_values_are_refused(subject: Subject) -> None:
    """A value of the wrong type, or outside the allowed ones, is a ConfigError that names the option."""
    for option in describe_options(subject.info.options):
        wrong = [{"no": "value"}] if option.kind != "list" else 0
        message = _refusal(subject, {option.name: wrong})
        expect(message, f"{option.name}={wrong!r} was accepted")
        expect(option.name in message, f"the refusal of {option.name}={wrong!r} does not name the option: {message!r}")
        if option.values:
            missing = [value for value in option.values if repr(value) not in message]
            expect(not missing, f"the refusal of {option.name} does not name the allowed {missing}: {message!r}")


@check(per="backend")
def options_are_frozen(subject: Subject) -> None:
    """A config can be neither changed nor extended, and converts from strict records only."""
    name, settings = subject.info.options.__name__, subject.info.options.__struct_config__
    expect(settings.frozen, f"{name} is not frozen: class {name}(BackendOptions, frozen=True, ...)")
    expect(settings.forbid_unknown_fields, f"{name} lacks forbid_unknown_fields=True")
    for options in subject.info.presets.values():
        hash(subject.handle.config(options))


@check()
def options_survive_conversion(subject: Subject, preset: str) -> None:
    """A preset's config is the same after JSON, and the same from the text of a command line."""
    config = subject.handle.config(subject.info.presets[preset])
    values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(config))
    again = subject.handle.config(values)
    expect(again == config, f"{config} became {again} after JSON")
    text = {name: _as_text(value) for name, value in subject.info.presets[preset].items()}
    read = convert(subject.info.options, text, strict=False)
    expect(read == config, f"{config} became {read} when its options were read as text")


def _as_text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _refusal(subject: Subject, options: Mapping[str, object]) -> str:
    """The message of the ConfigError that `options` give; empty where they are accepted."""
    try:
        subject.handle.config(options)
    except ConfigError as error:
        return str(error)
    return ""
