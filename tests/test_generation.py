"""Prompts, parameters and limits of a generation, and what models keep between tokens: on plain transformers models."""

import json

import polyquant
import pytest
from polyquant.errors import ConfigError
from polyquant.finetuning.data import read_examples
from polyquant.finetuning.options import TrainingOptions
from polyquant.finetuning.run import longest_example
from polyquant.finetuning.targets import target_modules
from polyquant.measure.speed import measure_speed
from polyquant.models import generation, limits, prompts
from polyquant.models.tokens import Decoder, pieces
from polyquant.testing.models import _tokenizer, tiny_model
from polyquant.types import LayerInfo

SMALL = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
POSITIONS = 64
GPT2 = {"vocab_size": 384, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
TABLES = {  # architecture -> (sizes, tokens that it has positions for)
    "GPT2": (GPT2, POSITIONS),
    "GPTJ": ({**GPT2, "rotary_dim": 8}, POSITIONS),
    "OPT": ({**SMALL, "ffn_dim": 128, "max_position_embeddings": POSITIONS, "word_embed_proj_dim": 64}, POSITIONS),
    "Roberta": ({**SMALL, "max_position_embeddings": POSITIONS, "is_decoder": True}, POSITIONS - 1),
    "Llama": (SMALL, None),
}  # fmt: skip
KEEPING = {  # architecture -> (sizes, what it calls what it keeps, bytes that each token adds)
    "Llama": (SMALL, "past_key_values", 2 * 2 * 2 * 16 * 4),
    "Mamba": ({**SMALL, "state_size": 8}, "cache_params", 0),
    "Mamba2": ({**SMALL, "state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16}, "cache_params", 0),
    "Rwkv": ({**SMALL, "attention_hidden_size": 64}, "state", 0),
    "RecurrentGemma": ({**SMALL, "head_dim": 16, "lru_width": 64, "block_types": ["recurrent", "attention"], "attention_window_size": 64}, "past_key_values", 2 * 2 * 16 * 4),
}  # fmt: skip
PIECES = ([3, 4, 5], [6], [7])


def model_of(architecture, sizes):
    import torch
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**sizes)
    name = {"GPT2": "GPT2LMHeadModel"}.get(architecture, f"{architecture}ForCausalLM")
    torch.manual_seed(0)
    return getattr(transformers, name)(config).float().eval()


def stream(model, tokenizer, prompt, parameters):
    made = generation.tokens(model, tokenizer, prompts.encode_prompt(tokenizer, prompt), parameters)
    return pieces(made, Decoder(tokenizer))


@pytest.fixture(scope="module")
def tokenizer():
    return _tokenizer()


@pytest.fixture
def ending():
    """A tokenizer that appends EOS to every text."""
    from tokenizers.processors import TemplateProcessing

    made = _tokenizer()
    ends = [("<s>", made.bos_token_id), ("</s>", made.eos_token_id)]
    made._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return made


@pytest.fixture(scope="module")
def llama():
    return model_of("Llama", SMALL)


# how long


@pytest.mark.parametrize("architecture", TABLES)
def test_the_positions_of_a_model_are_known(architecture):
    sizes, limit = TABLES[architecture]
    model = model_of(architecture, sizes)
    assert limits.limits_of(model).positions == limit
    assert generation.logits_of(model, [5] * (limit or 2 * POSITIONS)).shape[-1] == 384


def test_the_positions_of_a_picture_are_no_limit_of_text():
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 56, "patch_size": 14}  # fmt: skip
    import transformers

    config = transformers.Gemma3Config(
        text_config=SMALL, vision_config=vision, mm_tokens_per_image=4, image_token_index=380
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    assert [name for name, _ in model.named_modules() if name.endswith("position_embedding")]
    assert limits.limits_of(model) == (None, 384)


@pytest.mark.parametrize("architecture", [name for name, (_, limit) in TABLES.items() if limit])
def test_more_tokens_than_positions_are_refused_with_the_number(architecture, tokenizer):
    sizes, limit = TABLES[architecture]
    model = model_of(architecture, sizes)
    message = f"more than the {limit} positions that this model has"
    with pytest.raises(ConfigError, match=message):
        generation.logits_of(model, [5] * (limit + 1))
    feed = generation.session(model)
    feed([5] * (limit - 1))
    feed([5])
    with pytest.raises(ConfigError, match=message):
        feed([5])
    with pytest.raises(ConfigError, match=message):
        longest_example(model, limit + 1)
    assert longest_example(model, 0) == limit
    prompt, new = "x" * (limit - 8), {"do_sample": False}
    count = len(tokenizer(prompt).input_ids)
    assert isinstance("".join(stream(model, tokenizer, prompt, {"max_new_tokens": limit + 1 - count, **new})), str)
    with pytest.raises(ConfigError, match=f"{count} tokens and {limit + 2 - count} new ones are {message}"):
        stream(model, tokenizer, prompt, {"max_new_tokens": limit + 2 - count, **new})
    with pytest.raises(ConfigError, match=message):
        stream(model, tokenizer, prompt, {"max_length": limit + 2, **new})


def test_a_token_without_an_embedding_is_refused(tokenizer):
    model = model_of("Llama", {**SMALL, "vocab_size": 100})
    assert limits.tokenizer_notes(model, tokenizer)[0].startswith(
        "the tokenizer has 320 tokens and the model embeddings for 100"
    )
    assert limits.tokenizer_notes(model_of("Llama", SMALL), tokenizer) == []
    for run in (
        lambda: generation.logits_of(model, [5, 100]),
        lambda: generation.session(model)([5, 100]),
        lambda: stream(model, tokenizer, "\N{SNOWMAN}", {"max_new_tokens": 2}),
    ):
        with pytest.raises(ConfigError, match=r"token \d+ is not one of the 100 that this model has an embedding for"):
            run()


def test_speed_is_measured_with_tokens_that_the_model_has(tokenizer):
    from polyquant.loaded import LoadedModel
    from polyquant.options import BackendOptions

    model = model_of("Llama", {**SMALL, "vocab_size": 100})
    loaded = LoadedModel(model=model, tokenizer=tokenizer, config=BackendOptions(), kernel="torch")
    assert (loaded.vocabulary, len(tokenizer)) == (100, 320)
    assert measure_speed(loaded.session, loaded.vocabulary, prompt_tokens=16, generated_tokens=2, repetitions=1)


# parameters of generate


@pytest.mark.parametrize(
    "how", [{"num_beams": 2}, {"num_beams": 4, "num_return_sequences": 1}, {"stop_strings": ["x"]}]
)
def test_beams_and_stop_strings_work(llama, tokenizer, how):
    ids = tokenizer("hello", return_tensors="pt").input_ids
    wanted = llama.generate(ids, max_new_tokens=6, do_sample=False, tokenizer=tokenizer, **how)[0][ids.shape[1] :]
    text = "".join(stream(llama, tokenizer, "hello", {"max_new_tokens": 6, "do_sample": False, **how}))
    assert text == tokenizer.decode(wanted, skip_special_tokens=True)


def test_beams_of_a_generation_config_count_too(tokenizer):
    from transformers import GenerationConfig

    model, beams = model_of("Llama", SMALL), GenerationConfig(num_beams=2, max_new_tokens=4, eos_token_id=2)
    expected = "".join(stream(model, tokenizer, "hello", {"num_beams": 2, "max_new_tokens": 4}))
    assert "".join(stream(model, tokenizer, "hello", {"generation_config": beams})) == expected
    model.generation_config = beams
    assert "".join(stream(model, tokenizer, "hello", {})) == expected


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"num_return_sequences": 2, "do_sample": True},
            "generate gives one text, and num_return_sequences=2 asks for 2",
        ),
        ({"num_return_sequences": 2, "num_beams": 2}, "generate gives one text"),
        ({"streamer": None}, "streamer is given to transformers' generate here already; call model.generate"),
        ({"input_ids": [1]}, "input_ids is given to"),
        ({"template": {"a": 1}}, "generate does not know a parameter"),
        ({"temprature": 1.0}, "generate does not know a parameter"),
        ({"temprature": 1.0, "num_beams": 2}, "generate does not know a parameter"),
    ],
)
def test_what_one_text_cannot_be_is_refused(llama, tokenizer, how, message):
    with pytest.raises(ConfigError, match=message):
        list(stream(llama, tokenizer, "hello", {"max_new_tokens": 2, **how}))


# tokens


def tokens(model, tokenizer, **how):
    parameters = {"max_new_tokens": 12, **how.pop("parameters", {})}
    return list(generation.tokens(model, tokenizer, tokenizer("hello").input_ids, parameters, **how))


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.5, "top_k": 3}])
def test_log_probabilities_are_those_of_the_logits(llama, tokenizer, sampling):
    """Before temperature and the like; tokens are the same with and without."""
    plain = tokens(llama, tokenizer, parameters=sampling, seed=3)
    told = tokens(llama, tokenizer, parameters=sampling, seed=3, top=4)
    assert [token.id for token in told] == [token.id for token in plain]
    assert plain[0].logprob is None
    prompt = tokenizer("hello").input_ids
    rows = generation.logits_of(llama, [*prompt, *(token.id for token in told)]).log_softmax(-1)[len(prompt) - 1 :]
    for row, token in zip(rows, told):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        best = row.topk(4)
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert len(token.top) == 4
    if not sampling["do_sample"]:
        assert all(token.top[0][0] == token.id for token in told)


def test_a_seed_decides_what_is_drawn(llama, tokenizer):
    drawn = [
        [token.id for token in tokens(llama, tokenizer, parameters={"do_sample": True}, seed=seed)]
        for seed in (1, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1]
    assert len({tuple(ids) for ids in drawn}) == 3


def test_log_probabilities_of_beams_are_refused(llama, tokenizer):
    for name in ("num_beams", "prompt_lookup_num_tokens"):
        with pytest.raises(ConfigError, match=f"log-probabilities are .* and {name} asks for another way"):
            tokens(llama, tokenizer, parameters={name: 2}, top=1)


def test_a_stream_that_is_left_ends_its_generation(llama, tokenizer):
    """No thread goes on with it."""
    import threading

    before = set(threading.enumerate())

    def generating():
        return [thread for thread in threading.enumerate() if "work" in thread.name and thread not in before]

    made = generation.tokens(
        llama, tokenizer, [5, 6], {"max_new_tokens": 4000, "min_new_tokens": 4000, "do_sample": False}
    )
    next(made)
    assert len(generating()) == 1
    made.close()
    assert not generating()
    text = stream(llama, tokenizer, "hello", {"max_new_tokens": 4000, "min_new_tokens": 4000, "do_sample": False})
    next(text)
    text.close()
    assert not generating()


@pytest.mark.parametrize("text", ["plain words", "\N{SNOWMAN} and \N{GRINNING FACE}é", "a\n\n b  c ", "é" * 9])
def test_text_comes_in_whole_characters(tokenizer, text):
    decoder, ids = Decoder(tokenizer), tokenizer(text).input_ids
    found = [decoder.feed(token) for token in [*ids[:2], tokenizer.eos_token_id, *ids[2:]]]
    assert "".join(found) == text
    assert "\ufffd" not in "".join(found)
    assert decoder.end() == ""


def test_what_never_becomes_a_character_comes_at_the_end(tokenizer):
    first, *_ = tokenizer("\N{GRINNING FACE}").input_ids
    decoder = Decoder(tokenizer)
    assert [decoder.feed(first), decoder.end(), decoder.end()] == ["", "\ufffd", ""]


# prompts


def test_no_eos_stands_between_prompt_and_answer(llama, ending, tokenizer):
    assert ending("ab").input_ids[-1] == ending.eos_token_id
    plain = tokenizer("ab").input_ids
    assert prompts.encode_prompt(ending, "ab") == [ending.bos_token_id, *plain]
    assert prompts.encode_prompt(ending, "") == [ending.bos_token_id]
    assert prompts.encode_prompt(ending, "ab</s>") == [ending.bos_token_id, *plain, ending.eos_token_id]
    assert prompts.encode_prompt(tokenizer, "ab</s>") == [*plain, tokenizer.eos_token_id]


def test_a_bos_that_is_the_eos_stays_in_front(tokenizer):
    """OPT's and GPT-2's are one token."""
    from tokenizers.processors import TemplateProcessing

    made = _tokenizer()
    made.bos_token = "</s>"
    made._tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", made.eos_token_id)])
    assert prompts.encode_prompt(made, "ab") == [made.eos_token_id, *tokenizer("ab").input_ids]
    assert prompts.encode_prompt(made, "") == [made.eos_token_id]


@pytest.mark.parametrize(
    "record",
    [{"prompt": "ab ", "completion": "cd"}, {"prompt": "ab ", "completion": "cd</s>"}, {"text": "ab cd"}, {"text": "ab cd</s>"}],
)  # fmt: skip
def test_examples_hold_one_eos_at_the_end(ending, tokenizer, record, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    for each in (ending, tokenizer):
        ids = read_examples(tmp_path / "data.jsonl", each, TrainingOptions(), 512).examples[0].input_ids
        assert (ids.count(each.eos_token_id), ids[-1]) == (1, each.eos_token_id)


def test_switches_reach_the_chat_template(llama, tokenizer):
    made = _tokenizer()
    made.chat_template = "{{ messages[0].content }}{% if enable_thinking is false %}<no>{% endif %}"
    messages = [{"role": "user", "content": "hi"}]
    assert made.decode(prompts.encode_prompt(made, messages)) == "hi"
    assert made.decode(prompts.encode_prompt(made, messages, {"enable_thinking": False})) == "hi<no>"
    with pytest.raises(
        ConfigError, match=r"no switch 'enable_thinkin': it would change nothing. Did you mean 'enable_thinking'\?"
    ):
        prompts.encode_prompt(made, messages, {"enable_thinkin": False})
    with pytest.raises(ConfigError, match="enable_thinking belongs to the chat template: give the prompt as messages"):
        prompts.encode_prompt(made, "hi", {"enable_thinking": False})
    with pytest.raises(ConfigError, match="has no chat template"):
        prompts.encode_prompt(tokenizer, messages)
    made.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ConfigError, match="does not take these messages: no system here"):
        prompts.encode_prompt(made, messages)
    made.chat_template = "{{ messages[0].content }}{{ word }}"
    loaded = polyquant.loaded.LoadedModel(
        model=llama, tokenizer=made, config=polyquant.options.BackendOptions(), kernel=""
    )
    with pytest.raises(ConfigError, match="no switch 'wort'"):
        loaded.generate(messages, template={"wort": "x"}, max_new_tokens=2)
    assert isinstance(loaded.generate(messages, template={"word": "x"}, max_new_tokens=2), str)


# what is kept between tokens


@pytest.mark.parametrize("architecture", KEEPING)
def test_the_state_between_tokens_is_found_whatever_it_is_called(architecture):
    import torch

    sizes, name, _ = KEEPING[architecture]
    model, state = model_of(architecture, sizes), None
    with torch.inference_mode():
        for piece in PIECES:
            outputs, state = generation.run(model, torch.tensor([piece]), state)
        whole = model(input_ids=torch.tensor([sum(PIECES, [])]), use_cache=False)
    assert state.name == name
    assert torch.allclose(outputs.logits[0, -1], whole.logits[0, -1], atol=1e-4)


@pytest.mark.parametrize("architecture", KEEPING)
def test_what_a_token_adds_to_the_state_is_counted(architecture):
    from polyquant.memory.storage import tensor_bytes

    sizes, _, each = KEEPING[architecture]
    model = model_of(architecture, sizes)
    sizes = [tensor_bytes(generation.state_after(model, [5] * count).value) for count in (8, 16)]
    assert sizes[0] > 0
    assert (sizes[1] - sizes[0]) / 8 == each


def test_a_model_that_keeps_nothing_runs_all_tokens_again():
    import torch

    model = _openai_gpt()
    assert generation.state_after(model, [5, 6]) is None
    seen = []
    model.register_forward_pre_hook(
        lambda _, arguments, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    feed = generation.session(model)
    for piece in PIECES:
        feed(piece)
    assert seen == [3, 4, 5]
    assert torch.is_tensor(generation.logits_of(model, [5]))


def _openai_gpt():
    import transformers

    return transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**GPT2)).eval()


@pytest.mark.parametrize("architecture", KEEPING)
def test_a_plan_counts_what_is_kept(architecture):
    import torch
    from polyquant.memory.context import context_memory

    sizes, _, each = KEEPING[architecture]
    with torch.device("meta"):
        few, many = (context_memory(model_of(architecture, sizes), tokens, 1) for tokens in (8, 40))
    assert few.kv_cache_bytes > 0
    assert (many.kv_cache_bytes - few.kv_cache_bytes) / 32 == each


# before a load, before a training


def test_an_attention_that_is_not_here_is_refused_before_the_load(rowwise, tmp_path):
    model = tiny_model("llama", tmp_path)
    for name in ("flash_attention_2", "sdpaa"):
        with pytest.raises(
            ConfigError, match=f"cannot have the attention '{name}' here: .* use attention='sdpa' or attention='eager'"
        ):
            polyquant.load(model, "rowwise", device="cpu", attention=name)
    assert (
        polyquant.load(model, "rowwise", device="cpu", attention="eager").model.config._attn_implementation == "eager"
    )


def layers(*names):
    return [
        LayerInfo(name=f"backbone.layers.0.mixer.{name}.weight", shape=(4, 4), role="linear", bits=4, scheme="x",
                  stored_bytes=8, parts={}, device="cpu", quantized=True)
        for name in names
    ]  # fmt: skip


def test_adapters_go_by_default_where_peft_puts_them():
    mamba = model_of("Mamba2", KEEPING["Mamba2"][0])
    names, notes = target_modules(layers("in_proj", "out_proj"), (), mamba)
    assert names == ["backbone.layers.0.mixer.in_proj"]
    assert notes == ["out_proj got no adapters: PEFT puts none there in a model of this kind"]
    with pytest.raises(
        ConfigError, match="target 'out_proj' matches .*mixer.out_proj, which PEFT refuses: .*name others"
    ):
        target_modules(layers("in_proj", "out_proj"), ("out_proj",), mamba)
    assert target_modules(layers("in_proj", "out_proj"), (), model_of("Llama", SMALL)).notes == []
