"""Streaming generation with a transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Thread
from typing import Any

from polyquant.errors import ConfigError


def encode(tokenizer: Any, prompt: str | Sequence[dict[str, str]]) -> Any:
    """Token ids of `prompt`, (1, tokens). Raises ConfigError for messages without a chat template, or no tokens."""
    if isinstance(prompt, str):
        text, add_special = prompt, True
    elif getattr(tokenizer, "chat_template", None):
        text, add_special = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True), False
    else:
        raise ConfigError("the model has no chat template: give the prompt as plain text")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=add_special).input_ids
    if ids.shape[1] == 0:
        raise ConfigError("the prompt is empty: give at least one token")
    return ids


def stream(
    model: Any, tokenizer: Any, prompt: str | Sequence[dict[str, str]], parameters: Mapping[str, Any]
) -> Iterator[str]:
    """Pieces of text as `model.generate` makes them; its error, if any, is raised here."""
    import torch
    from transformers import TextIteratorStreamer

    ids = encode(tokenizer, prompt).to(model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **parameters)
        except BaseException as error:
            failures.append(error)
            streamer.end()

    def pieces() -> Iterator[str]:
        thread = Thread(target=work, daemon=True)
        thread.start()
        yield from (piece for piece in streamer if piece)
        thread.join()
        if failures:
            raise _explained(failures[0])

    return pieces()


def logits_of(model: Any, tokens: Sequence[int]) -> Any:
    """Logits of one sequence, float32 torch tensor (positions, vocabulary)."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([list(tokens)], device=model.device)
        return model(input_ids=ids, use_cache=False).logits[0].float()


def session(model: Any) -> Callable[[Sequence[int]], None]:
    """A new context of `model` with a key-value cache that grows with each call."""
    import torch

    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache: Any = None

    def feed(tokens: Sequence[int]) -> None:
        nonlocal cache
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=model.device)
            outputs = model(input_ids=ids, past_key_values=cache, use_cache=True, **last_only)
        cache = outputs.past_key_values
        if ids.device.type != "cpu":
            torch.accelerator.synchronize()

    return feed


def _explained(error: BaseException) -> BaseException:
    if isinstance(error, ValueError) and "model_kwargs" in str(error):
        explained = ConfigError(f"generate does not know a parameter: {error}")
        explained.__cause__ = error
        return explained
    return error
