"""Regular expressions that a checkpoint or an adapter brings, held to those that are matched in bounded time.

Python's `re` tries every way in which a pattern can fit a name: `(a+)+b` takes longer than the age of the universe for
a name of fifty letters, and nothing can interrupt it. transformers, peft and the backends' libraries match such
patterns against the name of every module. So each is measured here first, from how it is built.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from re import _constants as constants  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

LONGEST_PATTERN = 1000  # characters
MOST_STEPS = 10**6  # ways to try a name; a second of Python's time is about ten of these
MOST_TEXTS = 20_000  # texts of one config: each may be a pattern that is matched against every module
NAME_LENGTH, SAME_LETTERS = 80, 10  # of a module's name: its length, and how often one letter is in it
REPEATS = (constants.MAX_REPEAT, constants.MIN_REPEAT, constants.POSSESSIVE_REPEAT)
PREFIXES = ("re:", "+:", "-:")  # by which compressed-tensors and gptqmodel mark patterns


def unbounded(content: Any) -> str:
    """What is wrong with the patterns among all texts of a config, keys too; empty where each is matched in time.

    Texts that are no patterns are none that could be refused.
    """
    for number, text in enumerate(_texts(content), 1):
        if number > MOST_TEXTS:
            return f"it has more than {MOST_TEXTS} texts"
        if why := _why_unbounded(text):
            return f"matching names with the regular expression {text!r:.60} may never end: {why}"
    return ""


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from _texts(value)
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value)


def _why_unbounded(text: str) -> str:
    """Why matching with a text takes long; empty where it does not, or where the text is no pattern."""
    if not any(sign in text for sign in "*+{?|"):
        return ""
    if len(text) > LONGEST_PATTERN:
        return f"it has {len(text)} characters, {LONGEST_PATTERN} are allowed"
    pattern = text[3:] if text.startswith("re:") else text[2:] if text.startswith(PREFIXES[1:]) else text
    try:
        steps = _steps(list(parser.parse(pattern)))
    except (re.error, OverflowError):
        return ""
    except _Nested as error:
        return str(error)
    except RecursionError:
        return "it is nested too deeply"
    return f"there are {steps:.0e} ways to try one" if steps > MOST_STEPS else ""


class _Nested(Exception):
    """A repetition within a repetition."""


def _steps(items: Sequence[tuple[Any, Any]]) -> int:
    """At most how many ways a sequence of a parsed pattern can be tried on a name, roughly. Raises _Nested."""
    product = 1
    for place, (kind, value) in enumerate(items):
        if kind in REPEATS:
            product *= _repeated(*value, ends_plainly=_is_plain(items[place + 1 : place + 2]))
        elif kind is constants.SUBPATTERN:
            product *= _steps(list(value[3]))
        elif kind is constants.BRANCH:
            product *= _chosen([list(each) for each in value[1]])
        elif kind in (constants.ASSERT, constants.ASSERT_NOT):
            product *= _steps(list(value[1]))
        elif kind is constants.ATOMIC_GROUP:
            product *= _steps(list(value))
        elif kind in (constants.GROUPREF, constants.GROUPREF_EXISTS):
            raise _Nested("it refers back to a part of itself")
    return product


def _repeated(least: int, most: int, inner: Any, *, ends_plainly: bool) -> int:
    ways = _steps(list(inner))
    if most <= 1:
        return 1 + ways
    if ways > 1:
        raise _Nested("a repetition, or a choice, is repeated in it")
    lengths = min(int(most) - least + 1, NAME_LENGTH)
    return min(lengths, SAME_LETTERS) if ends_plainly else lengths


def _chosen(choices: Sequence[Sequence[tuple[Any, Any]]]) -> int:
    """Of choices that begin with different letters at most those of one letter can fit."""
    by_letter = Counter[Any]()
    for items in choices:
        plain = bool(items) and items[0][0] is constants.LITERAL
        by_letter[items[0][1] if plain else None] += _steps(items)
    any_letter = by_letter.pop(None, 0)
    return any_letter + max(by_letter.values(), default=0)


def _is_plain(following: Sequence[tuple[Any, Any]]) -> bool:
    """Whether a letter comes next, or a choice of texts: repetitions before it can end at that letter only."""
    if not following:
        return False
    kind, value = following[0]
    if kind is constants.SUBPATTERN:
        return _is_plain(list(value[3])[:1])
    if kind is constants.BRANCH:
        return all(_is_plain(list(each)[:1]) for each in value[1])
    return kind is constants.LITERAL
