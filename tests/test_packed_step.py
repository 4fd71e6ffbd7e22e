"""A decode step as one call: for every family the same as the model's own way, and only where nothing else is asked."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from polyquant.models.generation import new_cache
from polyquant.packed_weights import held, step
from polyquant.packed_weights.agreement import agree
from polyquant.packed_weights.decoder import decoder_of
from polyquant.packed_weights.linear import RepackedLinear
from polyquant.types import PackedFormat
from transformers import DynamicCache

from .packing import pack_linears, packed_like, random_weight

pytest.importorskip("polyquant_kernels")
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "pad_token_id": 0,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-scaled-rotary": ("Llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}}),
    "llama-dynamic-rotary": ("Llama", {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 16}),
    "mistral-window": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "phi3": ("Phi3", {}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1,
                            "logits_scaling": 4.0}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "olmo2": ("Olmo2", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 6, "attn_logit_softcapping": 1.0, "layer_types": SLIDING}),
    "gemma3": ("Gemma3", {"sliding_window": 6, "layer_types": SLIDING}),
}  # fmt: skip


def model_of(family: str, *, packed: bool = True) -> Any:
    name, more = FAMILIES[family]
    text = "Text" if name == "Gemma3" else ""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}{text}Config")(**{**SIZES, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
            elif "norm" not in parameter_name:
                parameter.normal_(std=0.1)
    if packed:
        pack_linears(model)
    return model


def generated(model: Any, ids: torch.Tensor, tokens: int = 12, **more: Any) -> Any:
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, output_logits=True,
            return_dict_in_generate=True, **more,
        )  # fmt: skip


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For how many texts each call of the kernels was."""
    steps: list[int] = []
    answer = step.DecodeStep.answer

    def counting(self: Any, given: Any) -> Any:
        answered = answer(self, given)
        if answered is not None:
            steps.append(len(given["input_ids"]))
        return answered

    monkeypatch.setattr(step.DecodeStep, "answer", counting)
    return steps


IDS = torch.arange(5, 13)[None]


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_is_generated_with_as_before(family: str, texts: int, counted: list[int]) -> None:
    model = model_of(family)
    ids = torch.stack([IDS[0] + 7 * text for text in range(texts)])
    before = generated(model, ids)
    assert step.attach(model), family
    counted.clear()
    after = generated(model, ids)
    assert counted == [texts] * 12
    for one, two in zip(before.logits, after.logits, strict=True):
        assert torch.allclose(one, two, atol=2e-3 * one.abs().max()), (one - two).abs().max()
    assert torch.equal(before.sequences, after.sequences)


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_reads_prompts_as_before(
    family: str, texts: int, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two parts, with more tokens than go through the layers at once, and than a window has."""
    monkeypatch.setattr(step, "AT_ONCE", 17)
    model = model_of(family)
    ids = torch.arange(5, 5 + 45 * texts).reshape(texts, 45)
    parts = (ids[:, :40], ids[:, 40:])

    def read() -> Any:
        answers, cache = [], None
        with torch.inference_mode():
            for part in parts:
                answers.append(model(part, past_key_values=cache, use_cache=True))
                cache = answers[-1].past_key_values
        return answers, cache

    before, their_cache = read()
    assert step.attach(model), family
    counted.clear()
    after, cache = read()
    assert counted == [texts] * 2
    for one, two in zip(before, after, strict=True):
        assert torch.allclose(one.logits, two.logits, atol=2e-3 * one.logits.abs().max())
    assert type(cache) is type(their_cache) and cache.get_seq_length() == their_cache.get_seq_length() == 45
    for theirs, mine in zip(their_cache.layers, cache.layers, strict=True):
        assert type(mine) is type(theirs)
        for one, two in ((theirs.keys, mine.keys), (theirs.values, mine.values)):
            assert one.shape == two.shape and torch.allclose(one, two, atol=2e-3 * one.abs().max())


def test_long_prompts_are_read_as_before(counted: list[int]) -> None:
    """More keys than are scored together, and than go through the layers at once."""
    ids = torch.randint(0, 320, (1, step.AT_ONCE + 77), generator=torch.Generator().manual_seed(0))
    for family in ("llama", "gemma2"):
        model = model_of(family)
        with torch.inference_mode():
            before = model(ids).logits
            assert step.attach(model)
            counted.clear()
            after = model(ids).logits
        assert counted == [1]
        assert torch.allclose(before, after, atol=5e-3 * before.abs().max()), (before - after).abs().max()


def test_prompts_of_odd_heads_go_the_usual_way(counted: list[int]) -> None:
    """Heads of 12 columns are no whole registers; their single tokens are the kernels' all the same."""
    sizes = {"hidden_size": 96, "num_attention_heads": 8, "head_dim": 12}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **sizes})).float().eval()
    pack_linears(model)
    before = generated(model, IDS)
    assert step.attach(model)
    counted.clear()
    after = generated(model, IDS)
    assert counted == [1] * 11
    assert torch.equal(before.sequences, after.sequences)


def test_long_prompts_go_the_usual_way_where_that_is_faster(
    counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of floats of 8 bits, which have no panels."""
    monkeypatch.setattr(step, "most_inputs", lambda weight, activations: 4)
    model = model_of("llama")
    assert step.attach(model)
    counted.clear()
    with torch.inference_mode():
        for tokens, texts, calls in ((4, 1, [1]), (5, 1, []), (2, 2, [2]), (3, 2, []), (1, 4, [4])):
            model(IDS[:1, :tokens].expand(texts, -1))
            assert counted == calls
            counted.clear()


def test_other_models_are_left_alone() -> None:
    dense, mixed, other = model_of("llama", packed=False), model_of("llama"), model_of("llama")
    mixed.model.layers[1].mlp.up_proj = dense.model.layers[1].mlp.up_proj
    other.model.config.model_type = "llama4"
    wide = model_of("llama")
    wide.model.norm.to(torch.bfloat16)
    for model in (dense, mixed, other, wide):
        assert not step.attach(model)
        assert "forward" not in model.model.__dict__


def test_columns_with_scales_of_their_own(counted: list[int]) -> None:
    model = model_of("llama")
    layout = PackedFormat(kind="affine4", group_size=32, offsets="zeros", column_scales=True)
    for layer in model.model.layers:
        for part in ("up_proj", "down_proj"):
            linear = getattr(layer.mlp, part)
            weight = random_weight((linear.out_features, linear.in_features), layout)[0]
            setattr(layer.mlp, part, RepackedLinear(weight, linear.bias, "int4", 4))
    before = generated(model, IDS)
    assert step.attach(model)
    after = generated(model, IDS)
    assert counted == [1] * 14  # two of them where it was asked whether both ways agree
    for one, two in zip(before.logits, after.logits, strict=True):
        assert torch.allclose(one, two, atol=2e-3 * one.abs().max()), (one - two).abs().max()
    assert torch.equal(before.sequences, after.sequences)


class Off(step.DecodeStep):
    """A step that is wrong by a twentieth where a text begins with a token of `wrong_after`."""

    wrong_after: tuple[int, ...] = ()

    def answer(self, given: Any) -> Any:
        found = super().answer(given)
        past = given.get("past_key_values")
        if past is None:
            self.first = int(given["input_ids"][0, 0])
        elif found is not None and self.first in self.wrong_after:
            found.last_hidden_state = found.last_hidden_state * 1.05
        return found


@pytest.mark.parametrize(
    ("wrong_after", "agrees"), [((), True), ((0,), True), ((0, 106), True), ((0, 106, 213), False)]
)
def test_a_text_that_carries_rounding_on_does_not_turn_steps_off(wrong_after: tuple[int, ...], agrees: bool) -> None:
    inner = model_of("llama").model
    decoder = decoder_of(inner)
    assert decoder is not None
    off = Off(inner, decoder)
    off.wrong_after = wrong_after
    assert agree(inner, off) is agrees


def test_a_model_whose_code_computes_otherwise_is_left_alone() -> None:
    """As a class of a checkpoint's own code might, under a known name."""
    model = model_of("llama")
    kind = type(model.model.layers[0].mlp)

    class Doubled(kind):  # type: ignore[misc,valid-type]
        def forward(self, x: Any) -> Any:
            return 2 * super().forward(x)

    model.model.layers[1].mlp.__class__ = Doubled
    assert not step.attach(model)


def test_what_is_not_the_plain_case_goes_the_usual_way(counted: list[int]) -> None:
    model = model_of("llama")
    assert step.attach(model)

    def asked(**more: Any) -> Any:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(IDS, past_key_values=cache)
        counted.clear()
        given = {"input_ids": IDS[:, :1], "past_key_values": cache, **more}
        with torch.no_grad():
            answer = model(**given)
        return answer, len(counted)

    assert asked()[1] == 1
    assert asked(attention_mask=torch.ones(1, 9, dtype=torch.long))[1] == 1
    assert asked(input_ids=IDS[:, :2])[1] == 1
    assert asked(input_ids=IDS[:, :2], position_ids=torch.tensor([[8, 9]]))[1] == 1
    assert asked(input_ids=IDS[:, :2], position_ids=torch.tensor([[0, 1]]))[1] == 0
    assert asked(past_key_values=None)[1] == 1
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, 0] = 0
    assert asked(attention_mask=mask)[1] == 0
    assert asked(output_hidden_states=True)[1] == 0
    assert asked(output_attentions=True)[1] == 0
    assert asked()[1] == 1
    assert asked(use_cache=False)[1] == 0
    assert asked(past_key_values=transformers.StaticCache(model.config, max_cache_len=32))[1] == 0
    assert asked(past_key_values=new_cache(model, "int8"))[1] == 0
    model.train()
    assert asked()[1] == 0
    model.eval()
    assert asked()[1] == 1
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert asked()[1] == 0
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert asked()[1] == 0
    handle.remove()
    assert asked()[1] == 1
    model.config.output_hidden_states = True
    assert asked()[1] == 0
    model.config.output_hidden_states = False
    assert asked()[1] == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert asked()[1] == 0
    model.model.layers[0].mlp.up_proj = packed_like(torch.nn.Linear(128, 256, bias=False))
    assert asked()[1] == 0


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_steps_are_whole_again_after_a_call_that_captured(asked: str, counted: list[int]) -> None:
    """transformers leaves its hooks in the model, which do nothing in other calls."""
    model = model_of("llama")
    model.set_attn_implementation("eager")  # the other has no attentions to give
    assert step.attach(model)
    plain = generated(model, IDS)
    with torch.inference_mode():
        captured = model(IDS, **{asked: True})
    assert len(captured[asked.removeprefix("output_")]) >= SIZES["num_hidden_layers"]
    assert any(module._forward_hooks for module in model.modules())
    counted.clear()
    again = generated(model, IDS)
    assert counted == [1] * 12
    assert torch.equal(again.sequences, plain.sequences)
    with torch.inference_mode():
        other = model(IDS, **{asked: True})
    assert counted == [1] * 12
    for one, two in zip(captured.to_tuple()[-1], other.to_tuple()[-1], strict=True):
        assert torch.equal(one, two)


def test_gradients_go_the_usual_way(counted: list[int]) -> None:
    model = model_of("llama")
    assert step.attach(model)
    counted.clear()
    cache = model(IDS).past_key_values
    model(IDS[:, :1], past_key_values=cache).logits.sum().backward()
    assert not counted and model.model.embed_tokens.weight.grad is not None


def test_a_cache_is_what_it_was_to_others() -> None:
    """Cropped, copied, reordered and continued by the model's own way, in any order."""
    model, plain = model_of("llama"), model_of("llama")
    assert step.attach(model)
    with torch.inference_mode():
        caches = [each(IDS).past_key_values for each in (model, plain)]
        for turn, ids in enumerate([IDS[:, :1], IDS[:, 1:2], IDS[:, 2:5], IDS[:, 5:6], IDS[:, 6:7]]):
            kept = copy.deepcopy(caches[0])
            held = [(layer.keys, layer.keys.clone()) for layer in caches[0].layers]
            one, two = (
                each(ids, past_key_values=cache).logits for each, cache in zip((model, plain), caches, strict=True)
            )
            assert torch.allclose(one, two, atol=1e-3)
            assert all(torch.equal(view, copied) for view, copied in held)
            again = model(ids, past_key_values=kept).logits
            assert torch.allclose(again, one, atol=1e-3)
            if turn == 1:
                for cache in caches:
                    cache.crop(-2)
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == 13
        for mine, theirs in zip(*(cache.layers for cache in caches), strict=True):
            assert mine.keys.shape == theirs.keys.shape and torch.allclose(mine.keys, theirs.keys, atol=1e-3)


def test_a_cropped_cache_leaves_earlier_views_alone() -> None:
    model = model_of("llama")
    assert step.attach(model)
    with torch.inference_mode():
        cache = model(IDS).past_key_values
        for _ in range(3):
            model(IDS[:, :1], past_key_values=cache)
        longer = cache.layers[0].keys
        before = longer.clone()
        cache.crop(-2)
        model(IDS[:, 4:5], past_key_values=cache)
    assert torch.equal(longer, before)


def test_long_texts_outgrow_their_room(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "SPARE", 5)
    model = model_of("gemma3")
    before = generated(model, IDS, 40)
    assert step.attach(model)
    counted.clear()
    assert torch.equal(generated(model, IDS, 40).sequences, before.sequences)
    assert len(counted) == 40


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"num_return_sequences": 1}])
def test_ways_of_generating(how: dict[str, Any], counted: list[int]) -> None:
    model, ids = model_of("qwen3"), IDS + 5  # at IDS itself beams are too close to each other
    before = generated(model, ids, 20, **how).sequences
    assert step.attach(model)
    assert torch.equal(generated(model, ids, 20, **how).sequences, before)


def test_left_padded_texts_go_the_usual_way(counted: list[int]) -> None:
    model = model_of("llama")
    ids, mask = torch.cat([IDS, IDS + 3]), torch.ones(2, 8, dtype=torch.long)
    ids[0, :3], mask[0, :3] = 0, 0
    before = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert step.attach(model)
    counted.clear()
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), before)
    assert not counted


def test_a_copy_computes_with_its_own_weights(counted: list[int]) -> None:
    model = model_of("llama")
    assert step.attach(model)
    wanted = generated(model, IDS).sequences
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in other.parameters():
            parameter.data.zero_()
        counted.clear()
        assert generated(other, IDS).logits[0].abs().max() == 0
        assert not counted
        assert torch.equal(generated(model, IDS).sequences, wanted)


def test_compiled_models_go_the_usual_way() -> None:
    model = model_of("llama")
    assert step.attach(model)
    with torch.inference_mode():
        wanted = model(IDS, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager")
        assert torch.allclose(compiled(IDS, use_cache=False).logits, wanted, atol=1e-4)


def test_adapters_are_part_of_what_is_computed(counted: list[int]) -> None:
    from peft import LoraConfig, get_peft_model

    model = model_of("llama")
    assert step.attach(model)
    with torch.no_grad():
        before = model(IDS[:, :1], past_key_values=model(IDS).past_key_values).logits
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
        counted.clear()
        after = adapted(input_ids=IDS[:, :1], past_key_values=adapted(input_ids=IDS).past_key_values).logits
    assert not counted and not torch.allclose(before, after, atol=1e-3)
