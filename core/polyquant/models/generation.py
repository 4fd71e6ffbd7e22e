"""Streaming generation with a transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple
from weakref import WeakSet

from polyquant.errors import ConfigError
from polyquant.models import decoding, structured, versions
from polyquant.models.limits import limits_of
from polyquant.models.structured import Schema
from polyquant.models.tokens import Token, Tokens
from polyquant.request import KvCache

OWN_PARAMETERS = ("inputs", "input_ids", "attention_mask", "inputs_embeds", "streamer", "return_dict_in_generate")
"""What `model.generate` is given here, or what would change the kind of its answer."""
NOT_BY_TOKEN = ("assistant_model", "prompt_lookup_num_tokens", "penalty_alpha", "dola_layers", "custom_generate")
"""Parameters that ask for a way to generate that judges several tokens at once, or by other logits."""
STATES = ("past_key_values", "cache_params", "state")
"""What models call what they keep between tokens: Mamba's cache_params, RWKV's state."""
_CACHE_IS_GIVEN = WeakSet[Any]()
"""Models that keep keys and values only in a cache that they are given."""
DEFAULT_NEW_TOKENS = 20  # transformers', where nobody says how many


def tokens(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    parameters: Mapping[str, Any],
    kv_cache: KvCache = "keep",
    *,
    seed: int | None = None,
    top: int | None = None,
    schema: Schema | None = None,
) -> Tokens:
    """Tokens after `ids` as `model.generate` makes them; its error, if any, is raised here.

    kv_cache: where `parameters` choose no other cache. seed: of torch's generators, set as it begins. top: give
    log-probabilities, and those of so many of the likeliest tokens. schema: of JSON, which the whole answer fits.
    Raises ConfigError, before anything is generated, for parameters that do not go with one text or with the schema,
    and for more tokens than the model has positions for.
    """
    import torch

    asked = _Asked(model, parameters)
    asked.require_one_text()
    limits_of(model).require(ids, new=asked.new_tokens(len(ids)))
    prompt = torch.tensor([list(ids)], device=model.device)
    given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "tokenizer": tokenizer, **parameters}
    if kv_cache != "keep" and not asked.chooses_cache:
        given[STATES[0]] = new_cache(model, kv_cache)
    seen, processors = None, list(parameters.get("logits_processor") or ())
    if top is not None:
        asked.require_token_by_token("log-probabilities are those")
        seen = decoding.Seen(top)
        processors.append(seen)
    if schema is not None:
        asked.require_token_by_token("a schema is kept to in the course")
        asked.require_free_end()
        fitting = structured.fitting(tokenizer, schema, asked.ends(tokenizer))
        processors.append(decoding.Structured(fitting, len(ids)))
    if processors:
        given["logits_processor"] = processors
    if asked["num_beams"] > 1:  # which text it is to be shows at the end only
        return _seeded(seed, _at_once(model, len(ids), given))
    return _seeded(seed, _as_it_comes(model, given, seen.token if seen is not None else Token))


def _seeded(seed: int | None, made: Tokens) -> Tokens:
    import torch

    if seed is not None:
        torch.manual_seed(seed)
    yield from made


class _Asked:
    """The parameters of a generation: those that were given, else those of the model's generation config."""

    def __init__(self, model: Any, parameters: Mapping[str, Any]) -> None:
        self._given = parameters
        self._config = parameters.get("generation_config") or model.generation_config

    def __getitem__(self, name: str) -> int:
        """A number; 0 where nobody says."""
        value = self._given[name] if name in self._given else getattr(self._config, name, None)
        return int(value or 0)

    def require_one_text(self) -> None:
        """Raises ConfigError for what `model.generate` is told here already, and for more texts than one."""
        for name in OWN_PARAMETERS:
            if name in self._given:
                raise ConfigError(f"{name} is given to transformers' generate here already; call model.generate for it")
        if (count := self["num_return_sequences"]) > 1:
            raise ConfigError(
                f"generate gives one text, and num_return_sequences={count} asks for {count}: call it as often, with "
                "do_sample=True, or call model.generate"
            )

    def require_token_by_token(self, what: str) -> None:
        """Raises ConfigError for ways to generate in which a token is not chosen from the logits at its place."""
        others = [name for name in NOT_BY_TOKEN if self._given.get(name) or getattr(self._config, name, None)]
        if self["num_beams"] > 1:
            others.append("num_beams")
        if others:
            raise ConfigError(
                f"{what} of greedy decoding and of sampling, and {', '.join(others)} asks for another way: leave it "
                "out, or ask for none"
            )

    def require_free_end(self) -> None:
        """Raises ConfigError for parameters by which a text may not end where it is whole."""
        if late := [name for name in ("min_new_tokens", "min_length") if self[name]]:
            raise ConfigError(f"an answer that fits a schema ends where it is whole: leave {', '.join(late)} out")

    def ends(self, tokenizer: Any) -> frozenset[int]:
        """The tokens that end a text: as given, else the model's, else the tokenizer's."""
        said = self._given.get("eos_token_id", getattr(self._config, "eos_token_id", None))
        if said is None:
            said = getattr(tokenizer, "eos_token_id", None)
        return frozenset([] if said is None else [said] if isinstance(said, int) else map(int, said))

    @property
    def chooses_cache(self) -> bool:
        """Whether what is kept between tokens was chosen: a cache that is there, a kind of cache, or none."""
        chosen = any(self._given.get(name) is not None for name in (STATES[0], "cache_implementation"))
        return chosen or self._given.get("use_cache") is False

    def new_tokens(self, prompt: int) -> int:
        """How many tokens at most follow `prompt` ones."""
        if most := self["max_new_tokens"]:
            return most
        whole = self["max_length"]
        return max(0, whole - prompt) if whole else DEFAULT_NEW_TOKENS


def _at_once(model: Any, prompt: int, given: Mapping[str, Any]) -> Tokens:
    """All at the end, without the `prompt` ones in front."""
    try:
        output = model.generate(**given)
    except ValueError as error:
        raise _explained(error) from error
    yield from map(Token, output[0][prompt:].tolist())


def _as_it_comes(model: Any, given: Mapping[str, Any], made: Callable[[int], Token]) -> Tokens:
    try:
        new = decoding.new_tokens(model, given)
    except ValueError as error:
        raise _explained(error) from error
    return _by_thread(model, given, made) if new is None else (made(int(token)) for token in new)


def _by_thread(model: Any, given: Mapping[str, Any], made: Callable[[int], Token]) -> Tokens:
    """Through transformers' own loop, which ends with the token that it is at when nobody wants more of them."""
    queue, stopped = SimpleQueue[Token | BaseException | None](), Event()
    streamer = decoding.streamer(lambda token: queue.put(made(token)), stopped)

    def work() -> None:
        try:
            model.generate(streamer=streamer, **given)
        except BaseException as error:
            queue.put(error)
        else:
            queue.put(None)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while (token := queue.get()) is not None:
            if isinstance(token, BaseException):
                raise _explained(token)
            yield token
    finally:
        stopped.set()
        thread.join()


def logits_of(model: Any, tokens: Sequence[int]) -> Any:
    """Logits of one sequence, float32 torch tensor (positions, vocabulary); ConfigError for tokens that do not fit."""
    import torch

    limits_of(model).require(tokens)
    with torch.inference_mode():
        ids = torch.tensor([list(tokens)], device=model.device)
        return model(input_ids=ids, use_cache=False).logits[0].float()


class State(NamedTuple):
    """What a model keeps between tokens, and the name under which its forward pass gives and takes it."""

    name: str
    value: Any


def state_of(outputs: Any) -> State | None:
    """What the model keeps: keys and values, a recurrent state, or both; None where its outputs show nothing."""
    found = ((name, getattr(outputs, name, None)) for name in STATES)
    return next((State(name, value) for name, value in found if value is not None), None)


def run(model: Any, ids: Any, state: State | None = None, **more: Any) -> tuple[Any, State | None]:
    """Outputs for `ids`, (1, tokens), after the tokens of `state`, and the state after them.

    Some models keep keys and values only in a cache that they are given, which their outputs do not show: they are
    given one. None for the state of a model that keeps none, or keeps it where it does not say.
    """
    if state is None and model in _CACHE_IS_GIVEN:
        state = State(STATES[0], versions.empty_cache(model.config))
    outputs = model(input_ids=ids, use_cache=True, **({state.name: state.value} if state else {}), **more)
    after = state_of(outputs) or state
    if after is not None or STATES[0] not in inspect.signature(model.forward).parameters:
        return outputs, after
    cache = versions.empty_cache(model.config)
    again = model(input_ids=ids, use_cache=True, **{STATES[0]: cache}, **more)
    if not versions.is_filled(cache):
        return outputs, None
    _CACHE_IS_GIVEN.add(model)
    return again, State(STATES[0], cache)


def new_cache(model: Any, kv_cache: KvCache) -> Any:
    """An empty key-value cache, which `model` takes as past_key_values."""
    from polyquant.models import kv_cache as coded

    return coded.new_cache(model.config, kv_cache)


def beginning(model: Any, kv_cache: KvCache) -> State | None:
    """The state that a new context begins with; None where the model makes its own."""
    return None if kv_cache == "keep" else State(STATES[0], new_cache(model, kv_cache))


def state_after(model: Any, tokens: Sequence[int], kv_cache: KvCache = "keep") -> State | None:
    """What the model keeps after `tokens`; None where it shows none."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([list(tokens)], device=model.device)
        return run(model, ids, beginning(model, kv_cache))[1]


def session(model: Any, kv_cache: KvCache = "keep") -> Callable[[Sequence[int]], None]:
    """A new context of `model`, with the state that it keeps; one that keeps none runs all tokens at each call."""
    import torch

    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    limits = limits_of(model)
    seen, state = list[int](), beginning(model, kv_cache)
    steps = decoding.steps_of(model)

    def feed(tokens: Sequence[int]) -> None:
        nonlocal state
        limits.require(tokens, before=len(seen))
        seen.extend(tokens)
        with torch.inference_mode():
            ids = torch.tensor([list(tokens if state else seen)], device=model.device)
            _, state = run(model, ids, state, **last_only)
        if steps is not None and state is not None:
            steps.show_late(state.value)
        if ids.device.type != "cpu":
            torch.accelerator.synchronize()

    return feed


def _explained(error: BaseException) -> BaseException:
    if isinstance(error, ValueError) and "model_kwargs" in str(error):
        explained = ConfigError(f"generate does not know a parameter: {error}")
        explained.__cause__ = error
        return explained
    return error
