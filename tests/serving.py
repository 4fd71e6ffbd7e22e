"""A server on a thread of the test's process, and OpenAI's client for it."""

import math
import threading
from contextlib import contextmanager

import openai
import pytest
from polyquant.models.prompts import encode_prompt
from polyquant.serving import server as serving
from polyquant.serving.options import ServeOptions

PROMPT = "The captain stood on the deck"


def generating():
    return [thread for thread in threading.enumerate() if thread.name == "polyquant-generation"]


@contextmanager
def serving_of(loaded, **options):
    asked, before = ServeOptions(port=0, name="tiny", **options), generating()
    with serving.listening(asked) as taken:
        server = serving.Server(loaded, asked, taken)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(30)
            assert not thread.is_alive()
    assert generating() == before


@contextmanager
def client_of(server, key="unused"):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60) as client:
        yield client


def answers_like(model):
    """Served, a model of any runtime gives its own text, whole and in pieces, the log-probabilities of its logits, and the
    same for the same seed."""
    expected = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    with serving_of(model) as server, client_of(server) as client:
        how = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12}
        choice = client.completions.create(logprobs=2, temperature=0, **how).choices[0]
        assert choice.text == expected
        rows = model.logits(encode_prompt(model.tokenizer, PROMPT)).log_softmax(-1)
        assert choice.logprobs.token_logprobs[0] == pytest.approx(float(rows[-1].max()), abs=1e-3)
        assert math.isfinite(sum(choice.logprobs.token_logprobs))
        chunks = client.completions.create(stream=True, temperature=0, **how)
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        drawn = [client.completions.create(seed=seed, **how).choices[0].text for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
