"""A served model, asked by OpenAI's own client and over plain HTTP: answers are those of the model, and what is wrong is
said in OpenAI's form."""

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import polyquant
import pytest
from polyquant.errors import ConfigError, EnvironmentProblem
from polyquant.models.prompts import encode_prompt
from polyquant.models.tokens import Token
from polyquant.options import convert
from polyquant.serving import server as serving
from polyquant.serving.options import ServeOptions
from polyquant.serving.text import Text
from polyquant.serving.toolcalls import read_calls
from polyquant.testing import warm
from polyquant.testing.models import tiny_model

from .serving import PROMPT, answers_like, client_of, serving_of

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} answer <tool_call>{% endif %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}[assistant]"
)
MESSAGES = [{"role": "user", "content": "The water of the lake"}]
GREEDY = {"temperature": 0, "max_tokens": 16}
SLOW = {"prompt": PROMPT, "temperature": 0, "max_tokens": 450}  # tokens that take a second or more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def loaded(rowwise, folder):
    model = polyquant.load(folder, "rowwise", device="cpu")
    model.tokenizer.chat_template = TEMPLATE
    return model


@pytest.fixture(scope="module")
def served(loaded):
    with serving_of(loaded) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    with client_of(served) as made:
        yield made


def ask(server, path="/v1/completions", body=None, method="POST", **headers):
    """(status, answer, headers) over plain HTTP."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    content = body if isinstance(body, bytes | None) else json.dumps({"model": "tiny", **body}).encode()
    kind = {"Content-Type": "application/json"} if content is not None else {}
    try:
        connection.request(method, path, content, kind | headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.headers)
    finally:
        connection.close()


def error(answer):
    return json.loads(answer[1])["error"]


def metric(server, name):
    text = ask(server, "/metrics", method="GET")[1].decode()
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.rpartition(" ")[2])


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# what is answered


def test_greedy_text_is_that_of_the_model(loaded, client):
    expected = loaded.generate(PROMPT, max_new_tokens=16, do_sample=False)
    answer = client.completions.create(model="tiny", prompt=PROMPT, **GREEDY)
    assert answer.choices[0].text == expected
    assert (answer.choices[0].finish_reason, answer.model, answer.object) == ("length", "tiny", "text_completion")
    count = len(encode_prompt(loaded.tokenizer, PROMPT))
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": count, "completion_tokens": 16, "total_tokens": count + 16,
    }  # fmt: skip
    ids = encode_prompt(loaded.tokenizer, PROMPT)
    assert client.completions.create(model="tiny", prompt=ids, **GREEDY).choices[0].text == expected
    talk = client.chat.completions.create(model="tiny", messages=MESSAGES, **GREEDY)
    assert talk.choices[0].message.content == loaded.generate(MESSAGES, max_new_tokens=16, do_sample=False)
    assert talk.choices[0].message.role == "assistant"
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "The water "}, {"type": "text", "text": "of the lake"}]}
    ]
    again = client.chat.completions.create(model="tiny", messages=parts, **GREEDY)
    assert again.choices[0].message.content == talk.choices[0].message.content


@pytest.mark.parametrize("how", [GREEDY, {"seed": 5, "max_tokens": 16}, {"seed": 5, "max_tokens": 16, "logprobs": 2}])
def test_a_stream_is_the_same_in_pieces(client, how):
    whole = client.completions.create(model="tiny", prompt=PROMPT, **how)
    chunks = list(client.completions.create(
        model="tiny", prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **how
    ))  # fmt: skip
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert len(choices) > 4
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    if "logprobs" in how:
        pieces = [choice.logprobs for choice in choices if choice.logprobs]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert sum((getattr(piece, name) for piece in pieces), []) == getattr(whole.choices[0].logprobs, name)


def test_a_chat_streams_too(client):
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, **GREEDY)
    chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_seed_repeats_and_none_does_not(client):
    def drawn(**how):
        return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, **how).choices[0].text

    assert drawn(seed=1) == drawn(seed=1)
    assert len({drawn(seed=seed) for seed in range(4)}) > 1
    assert len({drawn() for _ in range(4)}) > 1
    assert drawn(top_p=1e-9) == drawn(temperature=0) == drawn(extra_body={"top_k": 1})


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_is_not_in_it(loaded, client, stream):
    whole = loaded.generate(PROMPT, max_new_tokens=40, do_sample=False)
    stop = whole[9:12]
    how = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 40, "stop": ["never", stop]}
    if stream:
        choices = [chunk.choices[0] for chunk in client.completions.create(stream=True, **how)]
        text, finish = "".join(choice.text for choice in choices), choices[-1].finish_reason
    else:
        choice = client.completions.create(**how).choices[0]
        text, finish = choice.text, choice.finish_reason
    assert text == whole.partition(stop)[0]
    assert finish == "stop"


def test_log_probabilities_are_those_of_the_logits(loaded, client):
    ids = encode_prompt(loaded.tokenizer, PROMPT)
    rows = loaded.logits(ids).log_softmax(-1)
    choice = client.completions.create(model="tiny", prompt=PROMPT, logprobs=3, **GREEDY).choices[0]
    given = choice.logprobs
    assert given.token_logprobs[0] == pytest.approx(float(rows[-1].max()), abs=1e-4)
    assert sorted(given.top_logprobs[0].values(), reverse=True) == pytest.approx(
        rows[-1].topk(3).values.tolist(), abs=1e-4
    )
    assert len(given.tokens) == len(given.text_offset) == 16
    assert [
        choice.text[at:].startswith(word) or "\ufffd" in word for word, at in zip(given.tokens, given.text_offset)
    ] == [True] * 16
    talk = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
    for entry in talk.choices[0].logprobs.content:
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
        assert len(entry.top_logprobs) == 2
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


def test_an_answer_may_fill_what_the_model_has_room_for(loaded, client):
    room = loaded.context
    assert room == 512
    count = len(encode_prompt(loaded.tokenizer, MESSAGES))
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0)
    assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (room, "length")
    with pytest.raises(
        openai.BadRequestError, match=f"the prompt has {count} tokens and max_tokens is {room}"
    ) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=room)
    assert caught.value.code == "context_length_exceeded"


def test_what_is_here_is_listed(served, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert ask(served, "/health", method="GET")[:2] == (200, b'{"status":"ok"}')
    client.completions.create(model="tiny", prompt=PROMPT, **GREEDY)
    before = [metric(served, f"polyquant_{name}_total") for name in ("generated_tokens", "prompt_tokens")]
    client.completions.create(model="tiny", prompt=PROMPT, **GREEDY)
    after = [metric(served, f"polyquant_{name}_total") for name in ("generated_tokens", "prompt_tokens")]
    assert [b - a for a, b in zip(before, after)] == [16, len(served.served.loaded.tokenizer(PROMPT).input_ids)]
    assert metric(served, "polyquant_first_token_seconds_count") > 0


# tools


def test_calls_of_tools_are_read_as_the_template_has_them(loaded):
    text = 'I look. <tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>\n<tool_call>{"name": "x"}</tool_call>'
    said = read_calls(loaded.tokenizer, [], [], text, [])
    assert said.content == "I look."
    first, second = (call["function"] for call in said.calls)
    assert (first["name"], json.loads(first["arguments"])) == ("weather", {"city": "Bern"})
    assert second == {"name": "x", "arguments": "{}"}
    for none in ("<tool_call>{not json}</tool_call>", '<tool_call>{"name": 3}</tool_call>', "<tool_call>{", "plain"):
        assert read_calls(loaded.tokenizer, [], [], none, []) == (none, ())


def test_a_response_template_of_the_tokenizer_comes_first():
    class Tokenizer:
        response_template = {"fields": {}}

        def decode(self, ids):
            return str(ids)

        def parse_response(self, ids, template, *, prefix, tools):
            assert (ids, template, prefix, tools) == ([3, 4], self.response_template, "[1, 2]", [{"a": 1}])
            call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
            return {"content": "said", "tool_calls": [call]}

    said = read_calls(Tokenizer(), [1, 2], [3, 4], "raw", [{"a": 1}])
    assert said.content == "said"
    assert said.calls[0]["function"] == {"name": "f", "arguments": '{"x":1}'}


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_reaches_the_client(loaded, served, client, monkeypatch, stream):
    """The tiny model calls nothing: its tokens are those of a call here."""
    ids = loaded.tokenizer('Well <tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>').input_ids
    monkeypatch.setattr(loaded, "tokens", lambda prompt, **how: (Token(each) for each in ids))
    how = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "temperature": 0}
    if stream:
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **how)]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        text, finish = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
        assert calls[0].index == 0
    else:
        choice = client.chat.completions.create(**how).choices[0]
        calls, text, finish = choice.message.tool_calls, choice.message.content, choice.finish_reason
    assert (text, finish) == ("Well", "tool_calls")
    assert (calls[0].function.name, json.loads(calls[0].function.arguments)) == ("weather", {"city": "Bern"})


def test_what_a_tool_answered_goes_back_into_the_template(loaded, client, monkeypatch):
    seen = []
    monkeypatch.setattr(loaded, "tokens", lambda prompt, **how: seen.append(prompt) or iter_of([5]))
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "12 degrees"}]  # fmt: skip
    client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS)
    text = loaded.tokenizer.decode(seen[0])
    assert '"weather"' in text
    assert text.endswith("[assistant][tool]12 degrees[assistant]")


def iter_of(ids):
    yield from map(Token, ids)


# what is refused


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", b"{", 400, "is no JSON"),
        ("/v1/completions", b"[" * 100000, 400, "the request"),
        ("/v1/completions", b'"\xff"', 400, "the request"),
        ("/v1/completions", {}, 400, "missing required field `prompt`"),
        ("/v1/completions", {"prompt": 3}, 400, "prompt"),
        ("/v1/completions", {"prompt": ""}, 400, "the prompt is empty"),
        ("/v1/completions", {"prompt": []}, 400, "one prompt a request"),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "one prompt a request"),
        ("/v1/completions", {"prompt": [5, 999999]}, 400, "token ids go from 0 to"),
        ("/v1/completions", {"prompt": [-1]}, 400, "token ids go from 0 to"),
        ("/v1/completions", {"prompt": "a", "colour": 1}, 400, "unknown field `colour`"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "n": 2}, 400, "n=2 is not supported"),
        ("/v1/completions", {"prompt": "a", "echo": True}, 400, "echo=true is not supported"),
        ("/v1/completions", {"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty=0.5 is not supported"),
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "there is no model 'other' here: it is 'tiny'"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"content": "a"}]}, 400, "messages[0] has no role"),
        ("/v1/chat/completions", {"messages": MESSAGES, "top_logprobs": 2}, 400, "goes with logprobs"),
        (
            "/v1/chat/completions", {"messages": MESSAGES, "response_format": {"type": "json_schema"}}, 400,
            "json_schema goes with type 'json_schema'",
        ),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "response_format": {"type": "json_object"}, "tools": TOOLS}, 400,
            "calls tools, or fits response_format",
        ),
        (
            "/v1/chat/completions",
            {
                "messages": MESSAGES,
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}},
            }, 400, "schema cannot be kept to: Invalid type: x",
        ),
        (
            "/v1/chat/completions", {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"}, 400,
            "tool_choice must be 'auto' or 'none'",
        ),
        (
            "/v1/chat/completions", {"messages": MESSAGES, "chat_template_kwargs": {"thinking": 1}}, 400,
            "has no switch 'thinking'",
        ),
        (
            "/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
            "served for text alone",
        ),
        ("/v1/embeddings", {}, 404, "POST /v1/embeddings is not here: there are POST /v1/chat/completions"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_wrong_requests_are_refused_in_openais_form(served, path, body, status, words):
    answer = ask(served, path, body)
    assert answer[0] == status, answer
    assert words in error(answer)["message"]
    assert error(answer)["type"] == "invalid_request_error"


def test_other_kinds_of_content_and_methods_are_refused(served):
    found = ask(served, body={"prompt": "a"}, **{"Content-Type": "text/plain"})
    assert (found[0], "must be application/json" in error(found)["message"]) == (415, True)
    assert ask(served, method="GET")[0] == 405
    found = ask(served, "/health", method="GET", Host="evil.example")
    assert (found[0], "a page of another site" in error(found)["message"]) == (403, True)


def test_a_model_without_a_chat_template_says_where_text_goes(loaded, client, monkeypatch):
    monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="has no chat template.*send text to /v1/completions"):
        client.chat.completions.create(model="tiny", messages=MESSAGES)
    monkeypatch.setattr(loaded.tokenizer, "chat_template", "{{ messages[0].content }}")
    with pytest.raises(openai.BadRequestError, match="knows no tools"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS)
    monkeypatch.setattr(loaded.tokenizer, "chat_template", "{{ messages[0].content }}{{ tools }}")
    with pytest.raises(openai.BadRequestError, match="how this model writes a call of a tool is not known"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS)


def test_an_error_of_the_model_is_one_of_the_server(loaded, served, client, monkeypatch, caplog):
    def failing(ids, **how):
        yield Token(5)
        raise RuntimeError("the kernel gave up")

    monkeypatch.setattr(loaded, "tokens", failing)
    with pytest.raises(openai.InternalServerError, match="the request failed: RuntimeError: the kernel gave up"):
        client.completions.create(model="tiny", prompt=PROMPT)
    with pytest.raises(openai.APIError, match="the kernel gave up"):
        list(client.completions.create(model="tiny", prompt=PROMPT, stream=True))
    assert "the kernel gave up" in caplog.text
    monkeypatch.undo()
    assert client.completions.create(model="tiny", prompt=PROMPT, **GREEDY).choices[0].text


def test_limits_keys_and_lines(loaded):
    with serving_of(loaded, api_key="secret", max_request_bytes=2000, max_tokens=400, waiting=1) as server:
        assert ask(server, "/health", method="GET")[0] == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret2"}):
            found = ask(server, "/v1/models", method="GET", **headers)
            assert (found[0], error(found)["code"]) == (401, "invalid_api_key")
        assert ask(server, "/metrics", method="GET")[0] == 401
        with client_of(server, "secret") as client:
            assert client.models.list()
            with pytest.raises(openai.APIStatusError, match="more than 2000 bytes") as caught:
                client.completions.create(model="tiny", prompt="x" * 3000)
            assert caught.value.status_code == 413
            with pytest.raises(openai.BadRequestError, match="400 together at most"):
                client.completions.create(model="tiny", prompt=PROMPT, max_tokens=500)
            with ThreadPoolExecutor(6) as pool:
                how = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 300}
                jobs = [pool.submit(client.completions.create, **how) for _ in range(6)]
                errors = [job.exception() for job in jobs]
            refused = [each for each in errors if each is not None]
            assert len(refused) == 4, errors
            assert all(isinstance(each, openai.RateLimitError) for each in refused)
            assert refused[0].response.headers["Retry-After"] == "5"


# many, and those who leave


def test_twenty_clients_at_once_get_their_own_answers(loaded, served):
    prompts = [f"The captain had {number} ships" for number in range(20)]
    expected = [loaded.generate(prompt, max_new_tokens=12, do_sample=False) for prompt in prompts]

    def answer(number):
        with client_of(served) as client:
            how = {"model": "tiny", "prompt": prompts[number], "temperature": 0, "max_tokens": 12}
            if number % 2:
                return client.completions.create(**how).choices[0].text
            return "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **how))

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(answer, range(20))) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(served, stream):
    before = metric(served, "polyquant_abandoned_requests_total")
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    body = json.dumps({"model": "tiny", **SLOW, "stream": stream})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    if stream:
        connection.getresponse().read(20)
    else:
        until(lambda: metric(served, "polyquant_running_requests"))
    made = metric(served, "polyquant_generated_tokens_total")
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    until(lambda: metric(served, "polyquant_abandoned_requests_total") == before + 1)
    until(lambda: not metric(served, "polyquant_running_requests"))
    assert metric(served, "polyquant_generated_tokens_total") - made < SLOW["max_tokens"] - 50


def test_one_that_waits_may_leave_too(served):
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, served, body=SLOW)
        until(lambda: metric(served, "polyquant_running_requests"))
        connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
        connection.request(
            "POST", "/v1/completions", json.dumps({"model": "tiny", **SLOW}), {"Content-Type": "application/json"}
        )
        until(lambda: metric(served, "polyquant_waiting_requests") or first.done())
        connection.close()
        until(lambda: not metric(served, "polyquant_waiting_requests"))
        assert first.result()[0] == 200


# text


@pytest.mark.parametrize("stops", [(), ("lake",), ("zz", "of the"), ("e",), ("rx", "a", "the lake")])
def test_no_stop_text_is_ever_given(loaded, stops):
    text = "The water of the lake"
    shown = Text(loaded.decoder(), stops)
    pieces = []
    for token in loaded.tokenizer(text).input_ids:
        pieces.append(shown.feed(Token(token)))
        if shown.stopped:
            break
    pieces.append(shown.end())
    cut = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    assert "".join(piece.text for piece in pieces) == text[:cut]
    assert shown.stopped == (cut < len(text))
    starts = [at for piece in pieces for at, _ in piece.tokens]
    assert starts == sorted(starts)
    assert all(start < max(cut, 1) for start in starts)


# another runtime


def test_llama_cpp_is_served_alike(rowwise, folder, tmp_path):
    pytest.importorskip("llama_cpp")
    polyquant.quantize(folder, "gguf", tmp_path / "made", type="Q8_0", device="cpu")
    (path,) = (tmp_path / "made").glob("*.gguf")
    answers_like(polyquant.load(path, "llama-cpp", device="cpu"))


# before and after


def test_what_cannot_be_served_is_refused_before_the_model_is_read(run_python, tmp_path, monkeypatch):
    with serving.listening(ServeOptions(port=0)) as taken:
        port = str(taken.getsockname()[1])
        found = run_python("serve", str(tmp_path / "no model"), "--port", port)
        assert (
            found.returncode,
            f"port {port} of 127.0.0.1 cannot be had: Address already in use" in found.stderr,
        ) == (2, True)
    with (
        pytest.raises(ConfigError, match="is no address of this machine"),
        serving.listening(ServeOptions(host="no.such.host.invalid", api_key="x")),
    ):
        pass
    monkeypatch.setattr(serving, "LIBRARIES", ("starlette", "a_library_that_is_missing"))
    with pytest.raises(
        EnvironmentProblem, match=r"needs a_library_that_is_missing, .*pip install 'polyquant\[serve\]'"
    ):
        serving.require_libraries()


def test_other_machines_are_let_in_with_a_key_alone(monkeypatch):
    with pytest.raises(ConfigError, match="whoever reaches this machine could use the model at 0.0.0.0: give api_key"):
        convert(ServeOptions, {"host": "0.0.0.0"})
    monkeypatch.setenv("POLYQUANT_API_KEY", "secret")
    assert convert(ServeOptions, {"host": "0.0.0.0"}).api_key == "secret"
    assert [ServeOptions(host=host).is_loopback for host in ("::1", "127.0.0.2", "localhost", "10.0.0.1")] == [
        True
    ] * 3 + [False]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=str)
def test_a_signal_ends_it_in_good_order(folder, number):
    """In the middle of a stream: the client is told, the exit code is 0, and nothing is left."""
    words = ["serve", str(folder), "-b", "bitsandbytes", "--port", "0", "--name", "tiny"]
    command = [warm.interpreter(), "-m", "polyquant", *words]
    environment = {**os.environ, "POLYQUANT_KERNEL": "library"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        url = next(line for line in process.stderr if " at http://" in line).partition(" at ")[2].partition("/v1")[0]
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        body = {"model": "tiny", **SLOW, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        process.send_signal(number)
        rest = answer.read()
        connection.close()
        assert process.wait(30) == 0
        assert b"the server is ending" in rest
        assert process.stderr.read().strip() == "ended"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
