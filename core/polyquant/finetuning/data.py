"""Training examples from JSONL, plain text or a `datasets` name: each token id with whether its loss counts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from polyquant.errors import ConfigError
from polyquant.finetuning.options import TrainingOptions
from polyquant.models.prompts import ended, prompt_ids
from polyquant.support.texts.named import dataset_rows, read_utf8
from polyquant.types import UNREADABLE

IGNORED = -100  # label of a token whose loss does not count; torch's cross_entropy knows it
SHAPES = "'text', 'prompt' with 'completion', or 'messages' (a list of role and content)"


class Example(NamedTuple):
    """Token ids and, for each, the label: the id itself, or IGNORED."""

    input_ids: list[int]
    labels: list[int]


class Examples(NamedTuple):
    """All examples of a source, and what to say about them."""

    examples: list[Example]
    digest: str  # of the source's records
    notes: list[str]


def read_examples(data: str | Path, tokenizer: Any, options: TrainingOptions, limit: int) -> Examples:
    """Every example of `data`, tokenized.

    data: a .jsonl file, any other text file (one example a paragraph), or the name of a dataset for `datasets`.
    limit: longest example in tokens; packing cuts there too, and goes on in the next window. Raises ConfigError, with
    the line number and the reason, for a record that is none, for examples longer than `limit` unless truncate or
    packing is set, and where nothing is left to learn.
    """
    records = list(_records(data))
    if not records:
        raise ConfigError(f"{data} holds no examples; each line should hold {SHAPES}")
    digest = hashlib.sha256(msgspec.json.encode([record for _, record in records])).hexdigest()
    examples = []
    for where, record in records:
        try:
            examples.append(_example(record, tokenizer, completion_only=options.completion_only))
        except ValueError as error:
            raise ConfigError(f"{data}, {where}: {error}") from error
    notes: list[str] = []
    long = [(where, len(example.input_ids)) for (where, _), example in zip(records, examples, strict=True)
            if len(example.input_ids) > limit and not options.packing]  # fmt: skip
    if long:
        where, length = max(long, key=lambda entry: entry[1])
        what = f"{len(long)} of {len(examples)} examples have more than {limit} tokens (the longest {length}, {where})"
        if not options.truncate:
            raise ConfigError(f"{data}: {what}; cut them with truncate=True (--truncate), or raise max_length")
        examples = [Example(example.input_ids[:limit], example.labels[:limit]) for example in examples]
        notes.append(f"{what} and were cut")
    silent = sum(all(label == IGNORED for label in example.labels[1:]) for example in examples)
    if silent:
        notes.append(f"{silent} of {len(examples)} examples have no token to learn, and were left out")
        examples = [example for example in examples if any(label != IGNORED for label in example.labels[1:])]
    if not examples:
        raise ConfigError(f"{data}: no example has a token to learn; give completions, or completion_only=False")
    return Examples(pack(examples, limit) if options.packing else examples, digest, notes)


def pack(examples: Sequence[Example], length: int) -> list[Example]:
    """Examples joined one after the other and cut into windows of `length` tokens; they see their neighbours."""
    ids = [token for example in examples for token in example.input_ids]
    labels = [label for example in examples for label in [IGNORED, *example.labels[1:]]]
    starts = range(0, len(ids), length)
    packed = [Example(ids[start : start + length], labels[start : start + length]) for start in starts]
    return [example for example in packed if any(label != IGNORED for label in example.labels[1:])]


def _records(data: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of every example."""
    path = Path(data)
    if not path.is_file():
        yield from ((f"row {number}", row) for number, row in enumerate(dataset_rows(str(data), "train")))
        return
    text = read_utf8(path)
    if path.suffix not in (".jsonl", ".json"):
        paragraphs = [part.strip() for part in text.split("\n\n")]
        yield from ((f"paragraph {number}", {"text": part}) for number, part in enumerate(paragraphs, 1) if part)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = msgspec.json.decode(line)
        except UNREADABLE as error:
            raise ConfigError(f"{data}, line {number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{data}, line {number} holds {type(record).__name__}, an object with {SHAPES} is wanted")
        yield f"line {number}", record


def _example(record: dict[str, Any], tokenizer: Any, *, completion_only: bool) -> Example:
    """Raises ValueError, which says what the record lacks."""
    if "messages" in record:
        return _conversation(record["messages"], tokenizer, completion_only=completion_only)
    if "prompt" in record and "completion" in record:
        prompt = prompt_ids(tokenizer, _text(record, "prompt"))
        answer = ended(tokenizer, tokenizer(_text(record, "completion"), add_special_tokens=False).input_ids)
        learned = [IGNORED] * len(prompt) if completion_only else list(prompt)
        return Example(prompt + answer, learned + answer)
    if "text" in record:
        ids = ended(tokenizer, prompt_ids(tokenizer, _text(record, "text")))
        return Example(ids, list(ids))
    raise ValueError(f"it has {', '.join(map(repr, record)) or 'nothing'}; {SHAPES} is wanted")


def _text(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key!r} must be text that is not empty, it is {value!r}")
    return value


def _conversation(messages: Any, tokenizer: Any, *, completion_only: bool) -> Example:
    """A chat through the model's template; what the assistant says is learned."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("it has messages, and the model has no chat template; give 'prompt' and 'completion'")
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("content"), str) and isinstance(message.get("role"), str)
        for message in messages
    ):
        raise ValueError("'messages' must be a list of objects with role and content")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is the assistant's, so there is nothing to learn")

    def ids(part: list[Any], *, open_answer: bool = False) -> list[int]:
        try:
            text = tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=open_answer)
        except Exception as error:  # a program of the model's
            raise ValueError(f"the model's chat template refuses it: {error}") from error
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    whole = ids(messages)
    if not completion_only:
        return Example(whole, list(whole))
    labels = [IGNORED] * len(whole)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = ids(messages[:number], open_answer=True), ids(messages[: number + 1])
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise ValueError("its answers cannot be told apart in this chat template; learn all: completion_only=False")
        labels[len(before) : len(after)] = whole[len(before) : len(after)]
    return Example(whole, labels)
