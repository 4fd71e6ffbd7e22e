"""The prompts that come with polyquant, and what is right about an answer. Imports nothing heavy."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from polyquant.types import Record

NEW_TOKENS = 48
"""Of an answer at most."""
REFUSALS = re.compile(
    r"\b(I('m| am) (sorry|unable|not able|afraid)|I (can(not|'t| not)|won't|will not|must decline)|can't (help|assist)"
    r"|cannot (help|assist|provide)|not able to (help|assist)|against the law|illegal|as an AI)\b",
    re.IGNORECASE,
)
FENCE = re.compile(r"```\w*\n(.*?)(```|$)", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])?\s*\S")
CheckName = Literal["pattern", "number", "json", "list", "python", "refusal"]


class Question(Record, frozen=True):
    """A prompt, and how its answer is judged."""

    kind: Literal["instruction", "fact", "arithmetic", "format", "code", "refusal"]
    prompt: str
    check: CheckName
    expected: str  # pattern: a regular expression; number; json: its keys; list: lines; python: a function; yes or no


@cache
def questions() -> tuple[Question, ...]:
    """All of them, in their order."""
    return msgspec.json.decode(_file(), type=tuple[Question, ...])


@cache
def prompts_hash() -> str:
    """Of the prompts and of how many tokens an answer may have: what answers depend on beside the model."""
    return hashlib.sha256(_file() + str(NEW_TOKENS).encode()).hexdigest()[:16]


def right(question: Question, answer: str) -> bool:
    """Whether the answer is what the question asks for; no code of an answer is run."""
    return _CHECKS[question.check](question.expected, answer.strip())


def refused(answer: str) -> bool:
    """Whether the answer declines to answer: by its words."""
    return bool(REFUSALS.search(answer.replace("\u2019", "'")))


def _file() -> bytes:
    return (Path(__file__).parent / "prompts.json").read_bytes()


def _pattern(expected: str, answer: str) -> bool:
    return bool(re.search(expected, answer, re.IGNORECASE))


def _number(expected: str, answer: str) -> bool:
    """The last number is the expected one."""
    numbers = NUMBER.findall(answer)
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(expected)


def _json(expected: str, answer: str) -> bool:
    """All of it, less a fence, is an object with these keys."""
    try:
        value: Any = msgspec.json.decode(_unfenced(answer))
    except msgspec.DecodeError:
        return False
    return isinstance(value, dict) and set(value) == set(expected.split(","))


def _list(expected: str, answer: str) -> bool:
    lines = [line for line in _unfenced(answer).splitlines() if line.strip()]
    return len(lines) == int(expected) and all(map(ITEM.match, lines))


def _python(expected: str, answer: str) -> bool:
    """It parses and defines this function."""
    try:
        tree = ast.parse(_unfenced(answer))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == expected for node in tree.body)


def _refusal(expected: str, answer: str) -> bool:
    return refused(answer) == (expected == "yes")


def _unfenced(answer: str) -> str:
    fenced = FENCE.search(answer)
    return (fenced[1] if fenced else answer).strip()


_CHECKS: Mapping[CheckName, Callable[[str, str], bool]] = {
    "pattern": _pattern, "number": _number, "json": _json, "list": _list, "python": _python, "refusal": _refusal,
}  # fmt: skip
