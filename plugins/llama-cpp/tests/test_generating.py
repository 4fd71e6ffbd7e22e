"""llama.cpp against transformers on small models: logits, text, parameters, and what may run at once."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import polyquant
import pytest
import torch
from polyquant.errors import ConfigError
from polyquant_llama_cpp import _sampling
from polyquant.testing.oracles import agree
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import EXACT, TOKENS, load


def greedy(dense, ids, **parameters):
    ids = torch.tensor([ids])
    out = dense.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **parameters)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "mixtral", "odd"])
def test_logits_are_those_of_transformers(exact, name):
    loaded, dense = exact(name)
    with torch.inference_mode():
        expected = dense(torch.tensor([TOKENS])).logits[0]
    agree("llama-cpp", "transformers' logits, float32", loaded.logits(TOKENS), expected, allowed=2e-3)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_packed_weights_give_the_logits_of_their_numbers(tiny, kind):
    """Off by what llama.cpp loses when it quantizes activations to 8 bits, and no more."""
    path = tiny("qwen2", kind)
    dense = AutoModelForCausalLM.from_pretrained(path.parent / "qwen2").eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, parameter in dense.named_parameters():
        tensor = stored[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        parameter.data = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    with torch.inference_mode():
        expected = dense(torch.tensor([TOKENS])).logits[0]
    found = load(path, **EXACT).logits(TOKENS)
    assert (found - expected).std() < 0.03 * expected.std()


def test_it_is_compared_with_the_dense_model(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path / "cache"))
    path = tiny("llama", "Q8_0")
    comparison = polyquant.compare(
        path.parent / "llama", [f"llama-cpp@{path}"], out=tmp_path / "out", device="cpu", windows=1, parts=("quality",)
    )
    result = comparison.rows[0].result
    assert result.status == "done", result.reason
    assert 0 < result.quality.kl_mean < 0.01
    ids = list(range(100))
    dense = AutoTokenizer.from_pretrained(path.parent / "llama")
    assert load(path).tokenizer.convert_ids_to_tokens(ids) == dense.convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": 24},
        {"max_length": 30},
        {},
        {"max_new_tokens": 24, "repetition_penalty": 1.4},
        {"max_new_tokens": 12, "eos_token_id": [310, 100]},
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_greedy_text_is_that_of_transformers(exact, name, parameters):
    loaded, dense = exact(name)
    ids = loaded.tokenizer("The water of the lake").input_ids
    expected = greedy(dense, ids, **{"eos_token_id": 2, **(parameters or {"max_new_tokens": 20})})
    text = loaded.tokenizer.decode(expected, skip_special_tokens=True)
    assert loaded.generate("The water of the lake", **parameters) == text


def test_a_generation_ends_at_its_token_and_not_before_the_least(exact):
    loaded, dense = exact()
    ids = loaded.tokenizer("The water of the lake").input_ids
    third = greedy(dense, ids, max_new_tokens=3, eos_token_id=2)[2]

    def count(**parameters):
        wanted = {"max_new_tokens": 12, "eos_token_id": third, **parameters}
        text = loaded.generate("The water of the lake", **wanted)
        expected = greedy(dense, ids, **wanted)
        assert text == loaded.tokenizer.decode([token for token in expected if token != third])
        return len(expected)

    assert count() == 3
    assert count(min_new_tokens=6) > 6
    assert count(min_length=len(ids) + 6) > 6


def test_sampling_follows_its_parameters_and_torchs_seed(packed):
    def sample(seed=1, **parameters):
        torch.manual_seed(seed)
        return packed.generate("The water", max_new_tokens=16, do_sample=True, **parameters)

    assert sample() == sample()
    assert len({sample(seed) for seed in range(4)}) > 1
    plain = packed.generate("The water", max_new_tokens=16)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        assert sample(**narrow) == plain, narrow


def test_sampled_frequencies_are_those_of_the_warped_distribution():
    """Of transformers' warpers, over a small vocabulary."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 30)
    warped = TemperatureLogitsWarper(0.7)(None, logits.clone())
    warped = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(12)(None, warped))
    expected = warped.softmax(-1)[0]
    wanted = _sampling.parameters({"do_sample": True, "temperature": 0.7, "top_k": 12, "top_p": 0.8})
    sampler = _sampling.Sampler(wanted, [], 30, 64)
    found = torch.bincount(torch.tensor([sampler.choose(logits[0].numpy()) for _ in range(4000)]), minlength=30) / 4000
    assert (found - expected).abs().max() < 0.03
    assert not found[expected == 0].any()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"max_tokens": 4}, "'max_tokens' is no generation parameter.*Did you mean 'max_new_tokens'"),
        ({"no_repeat_ngram_size": 2}, "no generation parameter that llama.cpp follows"),
        ({"num_beams": 4}, "num_beams"),
        ({"temperature": 0.5}, "temperature shape sampling: give do_sample=True"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 4, "max_length": 9}, "give max_new_tokens or max_length"),
        ({"max_length": 1}, "leaves room for none"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "at least 5 new tokens are asked for, and at most 4"),
        ({"eos_token_id": 384}, "eos_token_id must be from 0 to 383"),
        ({"max_new_tokens": 600}, r"the prompt has \d+ tokens, with 600 new ones .* the context holds 512"),
    ],
)
def test_parameters_that_cannot_be_followed_are_refused(packed, parameters, words):
    with pytest.raises(ConfigError, match=words):
        packed.stream("The water of the lake", **parameters)


def test_prompts_that_cannot_be_run_are_refused(packed):
    with pytest.raises(ConfigError, match="the prompt is empty"):
        packed.stream("")
    with pytest.raises(ConfigError, match="no chat template"):
        packed.stream([{"role": "user", "content": "Hello"}])
    with pytest.raises(ConfigError, match="513 tokens do not fit the context of 512"):
        packed.logits([5] * 513)
    with pytest.raises(ConfigError, match="tokens go from 0 to 383, got 5 to 384"):
        packed.logits([5, 384])
    with pytest.raises(ConfigError, match="at least one"):
        packed.logits([])


def test_text_comes_in_whole_characters(packed, monkeypatch):
    ids = packed.tokenizer("🙂é").input_ids
    pieces = [packed.tokenizer.piece(token) for token in packed.tokenizer("🙂é").input_ids]
    assert len(pieces) > 3
    assert b"".join(pieces).decode() == "🙂é"
    wanted = iter(ids)
    monkeypatch.setattr(_sampling.Sampler, "choose", lambda self, logits: next(wanted))
    assert list(packed.stream("The", max_new_tokens=len(ids))) == ["🙂", "é"]


def test_long_prompts_run_in_batches(tiny):
    tokens = [3 + index % 300 for index in range(100)]
    whole, parts = load(tiny("llama", "Q8_0"), **EXACT), load(tiny("llama", "Q8_0"), n_batch=32, **EXACT)
    torch.testing.assert_close(parts.logits(tokens), whole.logits(tokens), rtol=1e-2, atol=2e-2)


def test_streams_and_sessions_take_turns(packed):
    prompts = ["The water of", "A prime number"]
    expected = [packed.generate(prompt, max_new_tokens=12) for prompt in prompts]
    streams = [packed.stream(prompt, max_new_tokens=12) for prompt in prompts]
    found = ["", ""]
    for _ in range(12):
        for index, stream in enumerate(streams):
            found[index] += next(stream, "")
            packed.logits(TOKENS)
    assert [text + "".join(stream) for text, stream in zip(found, streams)] == expected
    feed = packed.session()
    feed(TOKENS)
    feed(TOKENS)
    with pytest.raises(ConfigError, match="do not fit the context"):
        feed([5] * 500)


def test_threads_may_load_and_run_at_once(tiny):
    path = tiny("llama", "Q8_0")
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: load(path), range(4)))
        jobs = [model for model in models for _ in range(2)]
        texts = list(pool.map(lambda model: model.generate("The water", max_new_tokens=16), jobs))
    assert len(set(texts)) == 1
