"""A loop of our own around whole steps: the tokens of transformers' own loop, and only where nothing else is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from polyquant.models import decoding
from polyquant.packed_weights import held, step
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .test_packed_step import IDS, model_of

pytest.importorskip("polyquant_kernels")


class AfterSeven(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= IDS.shape[1] + 7)


def allowed(_: int, ids: torch.Tensor) -> list[int]:
    return list(range(len(ids) % 7, 320, 7))


def plus_one(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    scores[:, 5] += ids.shape[1]  # in place: the model's own logits stay as they were
    return scores


HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "least": {"min_new_tokens": 9, "eos_token_id": list(range(0, 320, 3))},
    "ended": {"eos_token_id": list(range(0, 320, 3))},
    "allowed": {"prefix_allowed_tokens_fn": allowed},
    "processed": {"logits_processor": LogitsProcessorList([plus_one])},
    "stopped": {"stopping_criteria": StoppingCriteriaList([AfterSeven()])},
    "padded": {"attention_mask": None, "pad_token_id": 0},
}


def attached(family: str = "llama") -> Any:
    model = model_of(family)
    assert step.attach(model)
    model.generation_config.eos_token_id = None
    return model


def asked(**more: Any) -> dict[str, Any]:
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 12, "do_sample": False, **more}


def made(model: Any, given: dict[str, Any]) -> list[int]:
    tokens = decoding.new_tokens(model, given)
    assert tokens is not None
    return [int(token) for token in tokens]


@pytest.mark.parametrize("how", list(HOW))
def test_the_tokens_are_those_of_transformers(how: str) -> None:
    model, given = attached(), asked(**HOW[how])
    torch.manual_seed(3)
    wanted = model.generate(**given)[0, IDS.shape[1] :].tolist()
    torch.manual_seed(3)
    assert made(model, given) == wanted
    ends = {"least": range(9, 13), "ended": range(1, 12), "stopped": [7]}
    assert len(wanted) in ends.get(how, [12])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_holds_everything_in_the_end(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "SPARE", 5)  # which the text outgrows, and a window of six
    model, caches = attached(family), [DynamicCache(config=model_of(family).config) for _ in range(3)]
    wanted = model.generate(**asked(past_key_values=caches[0]))[0, IDS.shape[1] :].tolist()
    assert made(model, asked(past_key_values=caches[1])) == wanted
    some = decoding.new_tokens(model, asked(past_key_values=caches[2]))
    assert some is not None
    assert [int(next(some)) for _ in range(4)] == wanted[:4]
    some.close()
    assert [cache.get_seq_length() for cache in caches] == [19, 19, 11]
    for theirs, mine in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.allclose(theirs.keys, mine.keys) and torch.allclose(theirs.values, mine.values)


NOT_PLAIN: dict[str, dict[str, Any]] = {
    "returned": {"return_dict_in_generate": True},
    "looked up": {"prompt_lookup_num_tokens": 3},
    "strings": {"stop_strings": "a"},
    "static": {"cache_implementation": "static"},
    "none kept": {"use_cache": False},
    "in chunks": {"prefill_chunk_size": 4},
    "two texts": {"input_ids": IDS.repeat(2, 1), "attention_mask": torch.ones(2, 8, dtype=torch.long)},
    "padding": {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])},
}


@pytest.mark.parametrize("what", list(NOT_PLAIN))
def test_what_is_not_plain_is_left_to_transformers(what: str) -> None:
    assert decoding.new_tokens(attached(), asked(**NOT_PLAIN[what])) is None


def test_models_whose_layers_are_called_alone_are_left_to_transformers() -> None:
    assert decoding.new_tokens(model_of("llama"), asked()) is None


def test_an_assistant_is_not_ignored() -> None:
    assert decoding.new_tokens(attached(), asked(assistant_model=model_of("llama"))) is None


def test_parameters_that_do_not_go_together_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        decoding.new_tokens(attached(), asked(nonsense=1))


def test_two_texts_in_turn() -> None:
    model, other = attached(), IDS + 20
    wanted = [made(model, asked()), made(model, asked(input_ids=other))]
    both = [decoding.new_tokens(model, given) for given in (asked(), asked(input_ids=other))]
    found: list[list[int]] = [[], []]
    for _ in range(12):
        for tokens, into in zip(both, found, strict=True):
            assert tokens is not None
            into.append(int(next(tokens)))
            assert torch.is_grad_enabled()  # between tokens the caller's own world is as it was
    assert found == wanted


def test_what_is_hooked_on_the_way_is_called() -> None:
    model = attached()
    wanted, seen = made(model, asked()), list[int]()
    tokens = decoding.new_tokens(model, asked())
    assert tokens is not None
    found = [int(next(tokens)) for _ in range(5)]
    norm = model.get_decoder().layers[1].input_layernorm
    handle = norm.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].shape[1]))
    found += [int(next(tokens)) for _ in range(3)]
    handle.remove()
    found += [int(token) for token in tokens]
    assert found == wanted and seen == [1, 1, 1]


def test_a_cache_that_shows_late_is_shown_before_it_goes_another_way() -> None:
    model, plain = attached(), model_of("llama")
    steps = decoding.steps_of(model)
    assert steps is not None
    with torch.inference_mode():
        caches = [each(IDS).past_key_values for each in (model, plain)]
        steps.show_late(caches[0])
        embedded = model.get_input_embeddings()(IDS[:, 2:5])  # goes the usual way
        for given in (
            {"input_ids": IDS[:, :1]}, {"input_ids": IDS[:, 1:2]}, {"inputs_embeds": embedded}, {"input_ids": IDS[:, 5:6]}
        ):  # fmt: skip
            one, two = (
                each(**given, past_key_values=cache).logits for each, cache in zip((model, plain), caches, strict=True)
            )
            assert torch.allclose(one, two, atol=1e-2)
        assert caches[0].get_seq_length() == 13  # the last step is not shown yet
        steps.show(caches[0])
        assert caches[0].get_seq_length() == 14
        assert torch.allclose(caches[0].layers[2].keys, caches[1].layers[2].keys, atol=1e-2)
