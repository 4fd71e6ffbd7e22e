"""What a loaded model can take: how many tokens in a row, and which ones. Asked before the work, in its words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from polyquant.errors import ConfigError
from polyquant.models.roles import beside_the_language_model

POSITION_TABLES = ("pos", "wpe")
"""How the tables of positions are called, by a part of their names: embed_positions, position_embeddings, wpe."""


class Limits(NamedTuple):
    """Of one model."""

    positions: int | None  # tokens that it has positions for; None where they are computed, as rotary ones are
    vocabulary: int  # rows of the input embedding: token ids go from 0 to one less

    def require(self, tokens: Sequence[int], *, before: int = 0, new: int = 0) -> None:
        """Raises ConfigError where the model has no positions for so many tokens, or no embedding for one of them.

        before: tokens that it has seen already. new: that are generated after these; the last is not run itself.
        """
        count = before + len(tokens)
        if self.positions is not None and count + max(0, new - 1) > self.positions:
            seen = f"{count} tokens" + (f" and {new} new ones" if new else "")
            raise ConfigError(
                f"{seen} are more than the {self.positions} positions that this model has; give or ask for fewer"
            )
        if tokens and max(tokens) >= self.vocabulary:
            raise ConfigError(
                f"token {max(tokens)} is not one of the {self.vocabulary} that this model has an embedding for: its "
                "tokenizer has more; leave out the text that becomes it, or take the tokenizer that belongs to the "
                "model"
            )


def limits_of(model: Any) -> Limits:
    """How many tokens in a row a model takes, and which."""
    embedding = model.get_input_embeddings()
    rows = int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])
    return Limits(min(_position_rows(model), default=None), rows)


def tokenizer_notes(model: Any, tokenizer: Any) -> list[str]:
    """What to know of a tokenizer that has tokens for which the model has no embedding."""
    rows = limits_of(model).vocabulary
    if len(tokenizer) <= rows:
        return []
    first = tokenizer.convert_ids_to_tokens([rows])[0]
    return [
        f"the tokenizer has {len(tokenizer)} tokens and the model embeddings for {rows}: text that becomes a token "
        f"beyond, such as {first!r}, is refused"
    ]


def _position_rows(model: Any) -> Iterator[int]:
    """Tokens that each table of positions has a row for; those of towers are of no text.

    Some tables leave their first rows out: up to the one of padding.
    """
    import torch

    is_tower = beside_the_language_model(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and _is_position_table(name) and not is_tower(name):
            padding = module.padding_idx
            unused = getattr(module, "offset", 0) if padding is None else padding + 1
            yield module.num_embeddings - unused
    for name, buffer in model.named_buffers():
        table = _is_position_table(name) and buffer.dim() == 2 and buffer.is_floating_point()
        if table and not is_tower(name.rpartition(".")[0]):
            yield buffer.shape[0]


def _is_position_table(name: str) -> bool:
    short = name.rpartition(".")[2]
    return any(part in short for part in POSITION_TABLES) and "rel" not in short
