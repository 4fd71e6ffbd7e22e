"""The tokenizer and the template of a file against transformers'."""

import pytest
from polyquant.errors import ConfigError
from polyquant.testing.texts import EVALUATION
from transformers import AutoTokenizer

from .conftest import load

TEXTS = (
    EVALUATION,
    "",
    " two  spaces\n\n\ttab",
    "naïve café 你好 🙂",
    "1234567890 3.14",
    "def f(x):\n    return x",
    "<s>a</s>",
)


def test_a_chat_goes_through_the_template(tiny, write, tmp_path):
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}</s>{% endif %}"
    path = write(tiny().parent / "llama", tmp_path / "chat.gguf", "Q8_0", lambda file: file.add_chat_template(template))
    loaded, messages = load(path), [{"role": "user", "content": "Hello"}]
    assert loaded.tokenizer.apply_chat_template(messages, tokenize=False) == "<s>user: Hello"
    assert loaded.generate(messages, max_new_tokens=5) == loaded.generate("<s>user: Hello</s>", max_new_tokens=5)
    with pytest.raises(ConfigError, match="chat template does not take these messages"):
        loaded.stream([{"role": "user", "content": "Hello"}, 1])


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_is_that_of_transformers(tiny, packed, text):
    theirs = AutoTokenizer.from_pretrained(tiny().parent / "llama")
    compare_tokenizers(packed.tokenizer, theirs, text)


@pytest.mark.real
def test_the_real_models_tokenizer_and_template_are_those_of_transformers():
    from polyquant.models.resolve import resolve_dense

    ours, theirs = (
        load("builtin:smollm2", n_ctx=64).tokenizer,
        AutoTokenizer.from_pretrained(resolve_dense("builtin:smollm2").path),
    )
    for text in (*TEXTS, "<|im_start|>user\nHi<|im_end|>"):
        compare_tokenizers(ours, theirs, text)
    assert (ours.bos_token_id, ours.eos_token_id, len(ours)) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "?"},
    ]
    for prompt in (True, False):
        texts = [
            each.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) for each in (ours, theirs)
        ]
        assert texts[0] == texts[1]


def compare_tokenizers(ours, theirs, text):
    ids = ours(text).input_ids
    assert ids == theirs(text).input_ids == ours(text)["input_ids"]
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
