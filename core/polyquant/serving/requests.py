"""What clients ask for, as OpenAI's interface has it; a field that would change nothing is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from polyquant.serving.refusals import Refused
from polyquant.types import UNREADABLE

Asked = TypeVar("Asked", bound="Request")
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, of /v1/completions
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1), "best_of": (None, 1), "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
    "logit_bias": (None, {}), "echo": (None, False), "suffix": (None, ""), "functions": (None, []),
    "function_call": (None, "none"), "modalities": (None, ["text"]), "parallel_tool_calls": (None, True),
    "reasoning_effort": (None,), "store": (None, False), "audio": (None,), "prediction": (None,),
    "web_search_options": (None,), "verbosity": (None,),
}  # fmt: skip
"""Fields that nothing here obeys -> values with which they ask for nothing."""


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream has beside its text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False  # a padding against listeners, which is OpenAI's alone


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A schema by its name."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None  # an answer fits in any case


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def __post_init__(self) -> None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema', and with no other")

    @property
    def schema(self) -> dict[str, Any] | None:
        """None: any text."""
        if self.json_schema is not None:
            return self.json_schema.schema
        return {"type": "object"} if self.type == "json_object" else None


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of completion take. Beside OpenAI's own: top_k, min_p and repetition_penalty, as `generate` has
    them."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    user: str | None = None  # who asks: this and what follows change no answer, OpenAI's either
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    n: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer, and are not in it."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)

    @property
    def most(self) -> int | None:
        """New tokens at most; None: all that there is room for."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens to give log-probabilities of; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def schema(self) -> dict[str, Any] | None:
        """Of JSON, which the answer has to fit; None: any text."""
        return None

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with what was used."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> dict[str, Any]:
        """Parameters of `generate`; what a request leaves out is as OpenAI has it: temperature 1, all tokens."""
        penalty = {} if self.repetition_penalty is None else {"repetition_penalty": self.repetition_penalty}
        if self.temperature == 0:
            return {"do_sample": False, **penalty}
        least = {} if self.min_p is None else {"min_p": self.min_p}
        return {
            "do_sample": True, "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p, "top_k": self.top_k or 0, **least, **penalty,
        }  # fmt: skip

    def require_obeyed(self) -> None:
        """Raises Refused for a field that nothing here obeys."""
        if not -(2**63) <= (self.seed or 0) < 2**63:
            raise Refused(400, f"seed must fit into 64 bits, got {self.seed}", parameter="seed")
        for name, neutral in NEUTRAL.items():
            value = getattr(self, name, None)
            if value not in neutral:
                raise Refused(
                    400, f"{name}={msgspec.json.encode(value).decode()} is not supported: leave {name} out",
                    code="unsupported_parameter", parameter=name,
                )  # fmt: skip


class CompletionRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`/v1/completions`."""

    prompt: str | list[int | str]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: Any = None
    suffix: Any = None
    best_of: Any = None

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def most(self) -> int | None:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS


class ChatRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`/v1/chat/completions`. chat_template_kwargs: switches of the chat template, as vLLM calls them."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    store: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered(self) -> Sequence[dict[str, Any]]:
        """The tools that the model may call."""
        return () if self.tool_choice == "none" else self.tools or ()

    @property
    def schema(self) -> dict[str, Any] | None:
        return self.response_format.schema if self.response_format is not None else None

    def require_obeyed(self) -> None:
        super().require_obeyed()
        if self.schema is not None and self.offered:
            raise Refused(
                400, "an answer calls tools, or fits response_format: leave one of them out",
                code="unsupported_parameter", parameter="response_format",
            )  # fmt: skip
        if self.offered and self.tool_choice not in (None, "auto"):
            raise Refused(
                400, "tool_choice must be 'auto' or 'none': no model can be made to call a tool here",
                code="unsupported_parameter", parameter="tool_choice",
            )  # fmt: skip
        if "chat_template" in (self.chat_template_kwargs or {}):
            raise Refused(400, "the chat template is the model's own: leave chat_template out",
                          parameter="chat_template_kwargs")  # fmt: skip
        if self.top_logprobs and not self.logprobs:
            raise Refused(400, "top_logprobs goes with logprobs: true", parameter="top_logprobs")


def read(kind: type[Asked], body: bytes) -> Asked:
    """The request in a body. Raises Refused for what is no JSON, no such request, or asks for what is not there."""
    try:
        asked = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise Refused(400, f"the request does not fit: {error}") from error
    except UNREADABLE as error:
        raise Refused(400, f"the request is no JSON: {error}") from error
    asked.require_obeyed()
    return asked


def messages_of(asked: ChatRequest) -> list[dict[str, Any]]:
    """Messages as chat templates take them: content as one text, arguments of tool calls as objects. Raises Refused."""
    return [_message(number, message) for number, message in enumerate(asked.messages)]


def _message(number: int, message: dict[str, Any]) -> dict[str, Any]:
    where = f"messages[{number}]"
    if not isinstance(message.get("role"), str):
        raise Refused(400, f"{where} has no role", parameter="messages")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text(f"{where}.content[{index}]", part) for index, part in enumerate(content))
    if content is not None and not isinstance(content, str):
        raise Refused(400, f"{where}.content must be text, or a list of parts", parameter="messages")
    found = {**message, "content": content or ""}
    if message.get("tool_calls"):
        found["tool_calls"] = [_call(where, call) for call in message["tool_calls"]]
    return found


def _text(where: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise Refused(400, f"{where} is {kind!r}: the model is served for text alone", parameter="messages")
    return str(part["text"])


def _call(where: str, call: Any) -> dict[str, Any]:
    try:
        function = call["function"]
        arguments = function["arguments"]
        whole = msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
        return {**call, "function": {**function, "arguments": whole}}
    except (KeyError, TypeError, *UNREADABLE) as error:
        raise Refused(
            400, f"{where}.tool_calls: each needs a function with a name and arguments, JSON in a string",
            parameter="messages",
        ) from error  # fmt: skip
