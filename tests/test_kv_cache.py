"""Key-value caches of integer codes: what they keep, what a plan says of them, how close they stay, what is refused."""

import json
import math

import polyquant
import pytest
import torch
import transformers
from polyquant.errors import ConfigError
from polyquant.loading.trial import require_keeping
from polyquant.memory.storage import tensor_bytes
from polyquant.models import generation, versions
from polyquant.models.kv_cache import BITS, RESIDUAL, CodedLayer
from polyquant.registry.observers import Recorder
from polyquant.testing.models import tiny_model

pytestmark = pytest.mark.skipif(versions.QuantizedLayer is object, reason="before transformers 4.56 all are refused")
NF4 = {"bits": 4, "device": "cpu", "compute_dtype": "float32"}
KINDS = tuple(BITS)
HEADS = {"llama": (2, 2, 64), "odd": (2, 1, 30)}  # layers, heads of keys, size of a head
SMALL = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OTHERS = {  # architecture -> (sizes, what it keeps)
    "Mistral": ({**SMALL, "sliding_window": 16}, "sliding windows"),
    "Mamba": ({**SMALL, "state_size": 8}, "a recurrent state"),
    "Rwkv": ({**SMALL, "attention_hidden_size": 64}, "a recurrent state"),
    "Lfm2": ({**SMALL, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}, "recurrent states"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def loads(folder):
    """Each tiny model with each cache, loaded once."""
    made = {}

    def load(name, kv_cache):
        if (name, kv_cache) not in made:
            made[name, kv_cache] = polyquant.load(tiny_model(name, folder), "bitsandbytes", kv_cache=kv_cache, **NF4)
        return made[name, kv_cache]

    return load


def text_of(loaded, count):
    """So many tokens that the model has."""
    torch.manual_seed(0)
    return torch.randint(3, loaded.vocabulary, (count,)).tolist()


def numbers(dtype, *shape):
    torch.manual_seed(0)
    return (torch.randn(shape) * torch.logspace(-2, 1, shape[-1])).to(dtype)


# codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 80, 128, 15])
@pytest.mark.parametrize("bits", BITS.values())
def test_codes_are_half_a_step_off_at_most(bits, size, dtype):
    layer, states = CodedLayer(bits), numbers(dtype, 2, 3, 5, size)
    states[0, 0, 0] = 3.5  # a group without a range
    before = states.clone()
    made = layer._quantize(states)
    again = layer._dequantize(made)
    assert torch.equal(states, before)
    assert (again.dtype, again.shape) == (dtype, states.shape)
    assert (made.codes.dtype, made.codes.shape[-1]) == (torch.uint8, math.ceil(size * bits / 8))
    group = size // made.scale.shape[-1]
    assert group == {64: 64, 80: 40, 128: 64, 15: 15}[size]
    step = (made.scale.float() + torch.finfo(torch.float32).tiny).repeat_interleave(group, -1)
    eps = torch.finfo(dtype).eps
    rounding = eps * (states.float().abs() + 2**bits * step)  # of the scale and of the result, in the compute dtype
    assert bool(((again.float() - states.float()).abs() <= step / 2 + rounding).all())
    assert torch.equal(again[0, 0, 0], states[0, 0, 0])


@pytest.mark.parametrize("bits", BITS.values())
def test_a_prompt_is_quantized_and_the_newest_tokens_wait_in_full(bits):
    layer, prompt, later = CodedLayer(bits), numbers(torch.float32, 1, 2, 200, 64), numbers(torch.float32, 1, 2, 1, 64)
    keys, values = layer.update(prompt, -prompt)
    assert torch.equal(keys, prompt)
    assert torch.equal(values, -prompt)  # a prompt sees itself in full
    for count in range(1, RESIDUAL):
        keys, _ = layer.update(later * count, later)
        assert layer.keys.shape[-2] == count
    coded = keys[..., :200, :]
    assert not torch.equal(coded, prompt)
    assert torch.equal(keys[..., 200:, :], torch.cat([later * count for count in range(1, RESIDUAL)], -2))
    layer.update(later, later)
    assert (layer.keys.numel(), layer.get_seq_length(), layer._quantized_keys.codes.shape[2]) == (0, 328, 328)
    keys, _ = layer.update(later, later)
    assert torch.equal(keys[..., :200, :], coded)  # codes are made once


@pytest.mark.parametrize("bits", BITS.values())
def test_sequences_and_tokens_are_taken_out_without_rounding_anew(bits):
    def filled():
        layer, states = CodedLayer(bits), numbers(torch.float32, 3, 2, 40, 64)
        layer.update(states[..., :30, :], -states[..., :30, :])
        layer.update(states[..., 30:, :], -states[..., 30:, :])
        return layer

    def states_of(layer):
        return [torch.cat([layer._dequantize(codes), rest], -2) for codes, rest in (
            (layer._quantized_keys, layer.keys), (layer._quantized_values, layer.values))]  # fmt: skip

    whole, beams = states_of(filled()), torch.tensor([2, 0, 0])
    changes = {
        "reorder_cache": (beams, lambda each: each[beams]),
        "batch_select_indices": (beams[:2], lambda each: each[beams[:2]]),
        "batch_repeat_interleave": (2, lambda each: each.repeat_interleave(2, 0)),
        "crop": (-25, lambda each: each[..., :15, :] if each.shape[-2] == 40 else each),
    }
    for name, (argument, expected) in changes.items():
        layer = filled()
        getattr(layer, name)(argument)
        for found, before in zip(states_of(layer), whole, strict=True):
            wanted = expected(before)
            assert torch.equal(found[..., : wanted.shape[-2], :], wanted), name
        assert layer.get_seq_length() == wanted.shape[-2]
    layer = filled()
    layer.crop(-4)
    assert (layer.get_seq_length(), layer.keys.shape[-2]) == (36, 6)
    assert torch.equal(states_of(layer)[0], whole[0][..., :36, :])


# bytes


@pytest.mark.parametrize("kv_cache", KINDS)
@pytest.mark.parametrize("name", HEADS)
def test_what_is_planned_is_what_is_kept(loads, folder, name, kv_cache):
    loaded, context = loads(name, kv_cache), 300
    plan = polyquant.plan(tiny_model(name, folder), "bitsandbytes", kv_cache=kv_cache, context=context, **NF4)
    full = polyquant.plan(tiny_model(name, folder), "bitsandbytes", context=context, **NF4)
    tokens = text_of(loaded, context)
    with torch.inference_mode():
        ids, state = torch.tensor([tokens]), generation.beginning(loaded.model, kv_cache)
        prompt = context - RESIDUAL + 1
        _, state = generation.run(loaded.model, ids[:, :prompt], state)
        for index in range(prompt, context):
            _, state = generation.run(loaded.model, ids[:, index : index + 1], state)
    assert plan.kv_cache == kv_cache
    assert plan.kv_cache_bytes == tensor_bytes(state.value) < full.kv_cache_bytes
    assert plan.activation_bytes == full.activation_bytes
    layers, heads, size = HEADS[name]
    each = layers * 2 * heads * (size * BITS[kv_cache] // 8 + 2 * 4)  # a scale and a minimum in float32
    assert loaded.kv_cache_bytes_per_token(tokens[:20]) == each
    assert plan.kv_cache_bytes == prompt * each + (RESIDUAL - 1) * full.kv_cache_bytes // context
    assert polyquant.verify(loaded).memory.kv_cache_bytes_per_token == each
    assert any(f"kept as {kv_cache} codes" in note for note in loaded.notes)


def test_a_plan_counts_codes_alike_in_every_compute_dtype(folder):
    path, bytes_of = tiny_model("llama", folder), {}
    for dtype in ("float32", "bfloat16"):
        options = {**NF4, "compute_dtype": dtype, "context": 4096}
        bytes_of[dtype] = polyquant.plan(path, "bitsandbytes", kv_cache="int8", **options).kv_cache_bytes
    heads = 2 * 2 * 2
    assert bytes_of["float32"] - bytes_of["bfloat16"] == heads * ((4096 - 127) * 2 * 2 + 127 * 64 * 2)


def test_tables_plan_with_it_and_say_where_it_cannot_be(folder):
    rows = polyquant.plan(tiny_model("llama", folder), kv_cache="int4", device="cpu").rows
    plans = [row.plan for row in rows if row.plan is not None]
    assert plans
    assert {plan.kv_cache for plan in plans} == {"int4"}
    assert not any(plan.backend == "llama-cpp" for plan in plans)


# quality


def test_int8_stays_close_and_int4_is_further(loads):
    def logits(kv_cache):
        loaded = loads("llama", kv_cache)
        ids = torch.tensor([text_of(loaded, 200)])
        with torch.inference_mode():
            _, state = generation.run(loaded.model, ids[:, :150], generation.beginning(loaded.model, kv_cache))
            outputs, _ = generation.run(loaded.model, ids[:, 150:], state)
        return outputs.logits.double().log_softmax(-1)

    full = logits("keep")
    kl = {kind: float((full.exp() * (full - logits(kind))).sum(-1).mean()) for kind in KINDS}
    assert 0 < kl["int8"] < 1e-3 < kl["int4"] < 0.5
    assert kl["int4"] > 20 * kl["int8"]


# running


@pytest.mark.parametrize("kv_cache", KINDS)
def test_texts_are_generated_with_it(loads, kv_cache):
    loaded, prompt = loads("llama", kv_cache), "The captain stood on the deck " * 3
    greedy = {"max_new_tokens": 160, "do_sample": False}  # longer than what waits in full
    text = loaded.generate(prompt, **greedy)
    assert text == "".join(loaded.stream(prompt, **greedy))
    inputs = loaded.tokenizer(prompt, return_tensors="pt")
    cache = loaded.new_cache()
    output = loaded.model.generate(**inputs, past_key_values=cache, **greedy)[0][inputs.input_ids.shape[1] :]
    assert loaded.tokenizer.decode(output, skip_special_tokens=True) == text
    assert all(isinstance(layer, CodedLayer) for layer in cache.layers)
    assert loaded.generate(prompt, num_beams=3, **greedy)
    guessed = loaded.generate(prompt, prompt_lookup_num_tokens=4, max_new_tokens=60, do_sample=False)
    assert text.startswith(guessed.rstrip("\N{REPLACEMENT CHARACTER}"))
    full = loads("llama", "keep")
    if kv_cache == "int4":
        assert text != full.generate(prompt, **greedy)
    assert loaded.generate(prompt, use_cache=False, **{**greedy, "max_new_tokens": 8}) == full.generate(
        prompt, **{**greedy, "max_new_tokens": 8}
    )
    own = transformers.DynamicCache(config=loaded.model.config)
    assert loaded.generate(prompt, past_key_values=own, **greedy) == full.generate(prompt, **greedy)


def test_sessions_keep_codes(loads):
    loaded = loads("llama", "int8")
    feed = loaded.session()
    feed(text_of(loaded, 40))
    feed([5])
    state = next(cell.cell_contents for cell in feed.__closure__ if isinstance(cell.cell_contents, generation.State))
    assert [type(layer) for layer in state.value.layers] == [CodedLayer] * 2
    assert {layer.get_seq_length() for layer in state.value.layers} == {41}


# refusals


@pytest.mark.parametrize("architecture", OTHERS)
def test_what_keeps_something_else_is_refused_before_it_is_loaded(architecture, tmp_path):
    sizes, what = OTHERS[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**sizes)
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(tmp_path)
    tiny = tiny_model("llama", tmp_path / "other")
    for path in tiny.glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    seen = Recorder()
    message = f"cannot have kv_cache='int8': .*{what}.*kv_cache='keep'"
    with polyquant.observing(seen), pytest.raises(ConfigError, match=message):
        polyquant.load(tmp_path, "bitsandbytes", kv_cache="int8", **NF4)
    assert "load" not in [record.hook for record in seen.records]
    with pytest.raises(ConfigError, match=message):
        polyquant.plan(tmp_path, "bitsandbytes", kv_cache="int8", **NF4)


def test_a_model_that_does_not_fill_the_cache_is_refused(loads, monkeypatch):
    loaded = loads("odd", "int8")
    forward = loaded.model.forward

    def forgetful(input_ids, past_key_values=None, **more):
        return forward(input_ids=input_ids, **more)

    monkeypatch.setattr(loaded.model, "forward", forgetful)
    with pytest.raises(ConfigError, match="layers 0, 1 of 2 do not keep its tokens there"):
        require_keeping(loaded)


def test_a_runtime_of_its_own_has_an_option_of_its_own(folder):
    pytest.importorskip("llama_cpp")
    for ask in (polyquant.load, polyquant.plan):
        with pytest.raises(
            ConfigError, match=r"llama-cpp has its own runtime; take its own option kv_cache_type: .*Q8_0"
        ):
            ask("builtin:smollm2", "llama-cpp", kv_cache="int8")


def test_wrong_words_and_commands_that_run_nothing_are_refused(folder, tmp_path):
    model = tiny_model("llama", folder)
    for ask in (polyquant.load, polyquant.plan):
        with pytest.raises(ConfigError, match="kv_cache must be 'keep', 'int8' or 'int4', got 'int5'"):
            ask(model, "bitsandbytes", kv_cache="int5", **NF4)
    with pytest.raises(ConfigError, match="no checkpoint stores kv_cache='int8': leave it out where you quantize"):
        polyquant.quantize(model, "bitsandbytes", tmp_path / "out", kv_cache="int8", **NF4)
    with pytest.raises(ConfigError, match="leave it out where you merge"):
        polyquant.merge(model, tmp_path / "adapter", tmp_path / "out", "dense", backend="bitsandbytes", kv_cache="int8")


def test_the_command_line_takes_it(run_python, folder):
    model = str(tiny_model("llama", folder))
    said = run_python("plan", model, "-b", "bitsandbytes", "--device", "cpu", "--kv-cache", "int4", "--json")
    assert json.loads(said.stdout)["kv_cache"] == "int4", said.stderr
    wrong = run_python("load", model, "-b", "bitsandbytes", "--kv-cache", "int3")
    assert (wrong.returncode, "int3" in wrong.stderr) == (2, True)
