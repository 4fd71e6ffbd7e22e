"""From a prompt to the token ids that a model continues."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from polyquant.errors import ConfigError, did_you_mean


def encode_prompt(
    tokenizer: Any, prompt: str | Sequence[Mapping[str, str]], template: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of `prompt`, open at the end. template: switches of the chat template.

    Raises ConfigError for messages without a chat template, switches that it does not know, or no tokens.
    """
    if isinstance(prompt, str):
        if template:
            raise ConfigError(f"{', '.join(template)} belongs to the chat template: give the prompt as messages")
        ids = prompt_ids(tokenizer, prompt)
    else:
        text = as_text(tokenizer, prompt, template or {})
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    if not ids:
        raise ConfigError("the prompt is empty: give at least one token")
    return ids


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` with the special tokens in front that the tokenizer adds, and none that end it."""
    ids = list(tokenizer(text).input_ids)
    return ids[: len(ids) - _endings(tokenizer)]


def ended(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """`ids` with the tokenizer's EOS at the end, once; as they are where it has none."""
    end = tokenizer.eos_token_id
    return [*ids] if end is None or (ids and ids[-1] == end) else [*ids, end]


def as_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], template: Mapping[str, Any]) -> str:
    """Chat messages through the model's template, up to where the answer begins."""
    source = getattr(tokenizer, "chat_template", None)
    if not source:
        raise ConfigError("the model has no chat template: give the prompt as plain text")
    words = set(re.findall(r"[a-zA-Z_]\w*", str(source)))
    for name in template:
        if name not in words:
            raise ConfigError(
                f"the model's chat template has no switch {name!r}: it would change nothing.{did_you_mean(name, words)}"
            )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)
    except ConfigError:
        raise
    except Exception as error:  # of the template, a program of the model's: it raises what it likes
        raise ConfigError(f"the model's chat template does not take these messages: {error}") from error
    return str(text)


def _endings(tokenizer: Any) -> int:
    """How many tokens the tokenizer adds after every text to end it."""
    ends = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)}
    ids, plain = (list(tokenizer("a", add_special_tokens=special).input_ids) for special in (True, False))
    added = ids[len(ids) - _after(ids, plain) :]
    return len(added) if ends.intersection(added) else 0


def _after(ids: Sequence[int], plain: Sequence[int]) -> int:
    """How many of `ids` follow `plain` in them; none where `plain` is not in them."""
    for start in range(len(ids) - len(plain) + 1):
        if list(ids[start : start + len(plain)]) == list(plain):
            return len(ids) - start - len(plain)
    return 0
