"""The tokenizer that is inside a GGUF, as llama.cpp runs it, with the part of transformers' interface that is used."""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from llama_cpp import llama_cpp as lib
from polyquant.errors import ConfigError
from polyquant.plugin import Decoder

from polyquant_llama_cpp._library import captured
from polyquant_llama_cpp._runtime import LlamaModel


class Encoding(dict[str, list[int]]):
    """Token ids of one text, as `.input_ids` or ["input_ids"]."""

    @property
    def input_ids(self) -> list[int]:
        return self["input_ids"]


class PieceDecoder(Decoder):
    """Text by the bytes that each token adds, which keeps a space in front."""

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        self._tokenizer, self._text = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._text.decode(self._tokenizer.piece(token))

    def end(self) -> str:
        return self._text.decode(b"", final=True)


class _Bytes:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: LlamaTokenizer, tokens: Sequence[bytes], special_token_ids: Sequence[int]) -> None:
        self._tokenizer, self.tokens, self.special_token_ids = tokenizer, tokens, special_token_ids
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode(), add_special_tokens=False)


class LlamaTokenizer:
    """Text to token ids and back. Special tokens written out in a text are read as such, as transformers does."""

    def __init__(self, model: LlamaModel) -> None:
        self._model, self._vocab = model, model.vocab  # the model owns the vocabulary
        self.bos_token_id = self._special(lib.llama_vocab_bos)
        self.eos_token_id = self._special(lib.llama_vocab_eos)
        self.pad_token_id = self._special(lib.llama_vocab_pad)

    def __len__(self) -> int:
        return self._model.vocabulary

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Encoding:
        """add_special_tokens: BOS and EOS, where the vocabulary says that it adds them."""
        return Encoding(input_ids=self.encode(text, add_special_tokens=add_special_tokens))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raw = text.encode()
        room = len(raw) + 8  # no vocabulary has tokens of less than a byte; BOS, EOS and a prefix come on top
        while True:
            ids = (lib.llama_token * room)()
            with captured() as log:
                count = lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, add_special_tokens, True)
            if count >= 0:
                return list(ids[:count])
            if -count <= room:
                raise ConfigError(f"llama.cpp cannot tokenize a text of {len(raw)} bytes: {log.reason()}")
            room = -count

    def decode(self, ids: int | Sequence[int], *, skip_special_tokens: bool = False) -> str:
        tokens = [ids] if isinstance(ids, int) else [int(token) for token in ids]
        if any(not 0 <= token < len(self) for token in tokens):
            raise ConfigError(f"tokens go from 0 to {len(self) - 1}, got {tokens}")
        array = (lib.llama_token * len(tokens))(*tokens)
        room = 16 * len(tokens) + 16
        while True:
            text = ctypes.create_string_buffer(room)
            count = lib.llama_detokenize(
                self._vocab, array, len(tokens), text, room, skip_special_tokens, not skip_special_tokens
            )
            if count >= 0:
                return text.raw[:count].decode(errors="replace")
            room = -count

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """How the vocabulary spells tokens, which is as transformers does: a space in front is a letter of its own."""
        return [lib.llama_vocab_get_text(self._vocab, token).decode(errors="replace") for token in ids]

    def piece(self, token: int) -> bytes:
        """The bytes that one token adds to a text; none for a special token."""
        room = 64
        while True:
            text = ctypes.create_string_buffer(room)
            count = lib.llama_token_to_piece(self._vocab, token, text, room, 0, False)
            if count >= 0:
                return text.raw[:count]
            room = -count

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a generation."""
        return frozenset(token for token in range(len(self)) if lib.llama_vocab_is_eog(self._vocab, token))

    @cached_property
    def chat_template(self) -> str | None:
        """The model's Jinja template for messages."""
        template = lib.llama_model_chat_template(self._model.model, None)
        return template.decode() if template else None

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, tokenize: bool = True, add_generation_prompt: bool = False,
        **switches: Any,
    ) -> Any:  # fmt: skip
        """The messages as one text, or as its token ids; switches: the template's own.

        Raises ConfigError where the template refuses them.
        """
        if self.chat_template is None:
            raise ConfigError("the model has no chat template: give the prompt as plain text")
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            formatter = Jinja2ChatFormatter(
                template=self.chat_template, eos_token=self._text(self.eos_token_id),
                bos_token=self._text(self.bos_token_id), add_generation_prompt=add_generation_prompt,
            )  # fmt: skip
            text = formatter(messages=[dict(message) for message in messages], **switches).prompt
        except Exception as error:  # of the template: it raises what it likes
            raise ConfigError(f"the model's chat template does not take these messages: {error}") from error
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def for_grammars(self, ends: list[int]) -> Any:
        """The vocabulary as llguidance has it: what each token adds to a text, and which are no text."""
        from llguidance import LLTokenizer, TokenizerWrapper

        pieces = [self.piece(token) for token in range(len(self))]
        vocabulary = _Bytes(self, pieces, [token for token, piece in enumerate(pieces) if not piece])
        return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=ends)

    def _special(self, find: Any) -> int | None:
        token = int(find(self._vocab))
        return token if token >= 0 else None

    def _text(self, token: int | None) -> str:
        return "" if token is None else self.decode(token)
