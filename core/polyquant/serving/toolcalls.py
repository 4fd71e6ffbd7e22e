"""Calls of tools in an answer, as the model's chat template has them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec

from polyquant.serving.refusals import Refused
from polyquant.types import UNREADABLE

OPENS, OTHER_FORM = "<tool_call>", "<function="
CALL = re.compile(r"\s*<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
"""The form of Hermes and Qwen: a JSON object with name and arguments."""


class Said(NamedTuple):
    """An answer with its calls taken out."""

    content: str
    calls: tuple[dict[str, Any], ...]  # as OpenAI's interface has them


def require_tools(tokenizer: Any) -> None:
    """Raises Refused where the chat template takes no tools, or the form in which it has calls is not known."""
    template = str(getattr(tokenizer, "chat_template", ""))
    if not re.search(r"\btools\b", template):
        raise Refused(
            400, "the model's chat template knows no tools: leave tools out", code="unsupported_parameter",
            parameter="tools",
        )  # fmt: skip
    if _declared(tokenizer) is None and (OPENS not in template or OTHER_FORM in template):
        raise Refused(
            400, "how this model writes a call of a tool is not known: its tokenizer has no response_template, and "
            f"its chat template none of {OPENS} with JSON; leave tools out",
            code="unsupported_parameter", parameter="tools",
        )  # fmt: skip


def read_calls(
    tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], text: str, tools: Sequence[Mapping[str, Any]]
) -> Said:
    """text: of the answer, whose tokens are `ids`; what looks like a call and is none stays in it."""
    if (template := _declared(tokenizer)) is not None:
        said = tokenizer.parse_response(list(ids), template, prefix=tokenizer.decode(list(prompt)), tools=list(tools))
        found = [(call["function"]["name"], call["function"]["arguments"]) for call in said.get("tool_calls") or ()]
        return Said(said.get("content") or "", tuple(_call(*each) for each in found))
    calls, rest, last = list[dict[str, Any]](), list[str](), 0
    for match in CALL.finditer(text):
        if (call := _hermes(match[1])) is not None:
            calls.append(call)
            rest.append(text[last : match.start()])
            last = match.end()
    return Said("".join([*rest, text[last:]]).strip() if calls else text, tuple(calls))


def _declared(tokenizer: Any) -> Any:
    """The tokenizer's own account of how answers are written; transformers reads it since 5.0."""
    return getattr(tokenizer, "response_template", None) if hasattr(tokenizer, "parse_response") else None


def _hermes(text: str) -> dict[str, Any] | None:
    try:
        call = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.ValidationError, *UNREADABLE):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return _call(call["name"], arguments) if isinstance(call.get("name"), str) else None


def _call(name: str, arguments: Any) -> dict[str, Any]:
    written = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
    return {"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": written}}
