"""Answers that are JSON of a schema: at each token, which may come next. By llguidance, the extra `schema`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import msgspec

from polyquant.errors import ConfigError, EnvironmentProblem

Schema = Mapping[str, Any]
"""A JSON schema."""
_ONE_LINE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As json.dumps writes. Where blanks are free, small models write them to the end."""
_VOCABULARIES: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()
"""Tokenizer -> the tokens that end an answer -> its vocabulary as llguidance has it, which takes a second to make."""


class Fitting:
    """One answer as it is made."""

    def __init__(self, vocabulary: Any, schema: Schema) -> None:
        """vocabulary: an LLTokenizer. Raises ConfigError for what is no schema, or asks for what is not obeyed."""
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(msgspec.json.encode(schema).decode(), overrides=_ONE_LINE)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"schema must be a JSON schema: {error}") from error
        self._matcher = LLMatcher(vocabulary, grammar, log_level=0)
        self._require_sound("schema cannot be kept to")

    def allowed(self) -> bytes:
        """A bit for each token, the lowest bit of the first byte for token 0: whether it may come next."""
        mask: bytes = self._matcher.compute_bitmask()
        self._require_sound("the answer cannot go on as its schema has it")
        return mask

    def take(self, token: int) -> None:
        """What came next."""
        self._matcher.consume_token(token)

    def _require_sound(self, what: str) -> None:
        if why := self._matcher.get_error():
            raise ConfigError(f"{what}: {why}")


def fitting(
    tokenizer: Any, schema: Schema, ends: Collection[int], make: Callable[[list[int]], Any] | None = None
) -> Fitting:
    """For an answer of `tokenizer`'s tokens.

    ends: the tokens that end an answer. make: llguidance's LLTokenizer from those, for a tokenizer that is none of
    transformers'. Raises EnvironmentProblem without llguidance; ConfigError for a schema that cannot be kept to, and
    for a tokenizer that is not known token by token.
    """
    require_llguidance()
    if not ends:
        raise ConfigError("an answer that fits a schema ends with a token, and the model names none that ends a text")
    kept, key = _VOCABULARIES.setdefault(tokenizer, {}), tuple(sorted(ends))
    if key not in kept:
        kept[key] = make(list(key)) if make else _of_transformers(tokenizer, list(key))
    return Fitting(kept[key], schema)


def require_llguidance() -> None:
    """Raises EnvironmentProblem where the extra `schema` is not installed."""
    if find_spec("llguidance") is None:
        raise EnvironmentProblem(
            "answers that fit a schema need llguidance, which is not installed: pip install 'polyquant[schema]'"
        )


def _of_transformers(tokenizer: Any, ends: list[int]) -> Any:
    from llguidance.hf import from_tokenizer

    try:
        return from_tokenizer(tokenizer, eos_token=ends)
    except ValueError as error:
        raise ConfigError(
            f"answers that fit a schema need a tokenizer of the tokenizers library, and this is "
            f"{type(tokenizer).__name__}: {error}"
        ) from error
