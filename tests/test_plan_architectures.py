"""Planned bytes against what is stored, on random models of many architectures with sizes that fit no group."""

import re

import polyquant
import pytest
from polyquant.models import versions
from polyquant.errors import ConfigError, DenseModelError, PolyquantError
from polyquant.testing.models import _tokenizer, tiny_model

SIZES = {
    "vocab_size": 391, "hidden_size": 90, "intermediate_size": 203, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 30, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES = {
    "Qwen3": {},
    "Gemma": {},
    "Phi": {"num_key_value_heads": 3, "partial_rotary_factor": 0.4},
    "Mistral": {"sliding_window": 16},
    "GPTNeoX": {},
    "Falcon": {"ffn_hidden_size": 203, "multi_query": True, "head_dim": ...},  # it derives its own
    "Mixtral": {"num_local_experts": 3, **(EVEN := {"hidden_size": 104, "intermediate_size": 200, "head_dim": 32})},
    "Qwen3Moe": {
        "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 56, "decoder_sparse_step": 1, **EVEN,
    },
}  # fmt: skip
"""torch multiplies experts of whole 16 bytes alone, so theirs are even, and fit no group either."""
CANNOT_RUN = {("Falcon", "torchao")}
"""Whose code takes a weight transposed, which torchao's have not."""
FUSED = pytest.mark.skipif(
    not versions.VERSION_5, reason="before transformers 5 experts are Linear modules, and quantized"
)
ON_THE_FLY = [info.name for info in polyquant.backends(on_the_fly=True)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A checkpoint of an architecture, tied or not, made once."""
    import torch
    import transformers

    folder, made = tmp_path_factory.mktemp("odd"), {}

    def make(architecture, tied):
        if (architecture, tied) not in made:
            sizes = {**SIZES, **ARCHITECTURES[architecture], "tie_word_embeddings": tied}
            config = getattr(transformers, f"{architecture}Config")(**{k: v for k, v in sizes.items() if v is not ...})
            torch.manual_seed(0)
            model = getattr(transformers, f"{architecture}ForCausalLM")(config).float()
            made[architecture, tied] = folder / f"{architecture}-{tied}"
            model.save_pretrained(made[architecture, tied])
            _tokenizer().save_pretrained(made[architecture, tied])
        return made[architecture, tied]

    return make


@pytest.mark.parametrize("backend", ON_THE_FLY)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_planned_is_what_is_stored(models, architecture, tied, backend):
    handle = polyquant.backend(backend)
    if handle.problems("cpu"):
        pytest.skip(f"{backend} does not run here")
    model, options = models(architecture, tied), options_of(handle)
    try:
        plan = polyquant.plan(model, backend, device="cpu", context=8, **options)
    except PolyquantError as error:
        with pytest.raises(type(error)):  # what cannot be planned is not loaded either
            polyquant.load(model, backend, device="cpu", **options)
        return
    if not any(tensor.quantized for tensor in plan.tensors):
        assert "every tensor would stay dense" in plan.notes[-1]
        with pytest.raises(DenseModelError):
            polyquant.load(model, backend, device="cpu", **options)
        return
    if (architecture, backend) in CANNOT_RUN:
        with pytest.raises(ConfigError, match=r"cannot run: .*keep them dense: skip="):
            polyquant.load(model, backend, device="cpu", **options)
        return
    loaded = polyquant.load(model, backend, device="cpu", **options)
    stored = sum(layer.stored_bytes for layer in loaded.initial_layers)
    assert plan.weights_planned_bytes == pytest.approx(stored, rel=0.01)
    assert {t.name for t in plan.tensors if t.quantized} == {t.name for t in loaded.initial_layers if t.quantized}


def options_of(handle):
    """The first preset."""
    return dict(next(iter(handle.info.presets.values()), {}))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A Mixtral whose sizes every backend takes."""
    return tiny_model("mixtral", tmp_path_factory.mktemp("mixtral"))


@FUSED
@pytest.mark.parametrize("backend", ON_THE_FLY)
def test_experts_that_stay_dense_are_named_or_really_quantized(mixtral, backend):
    handle = polyquant.backend(backend)
    if handle.problems("cpu"):
        pytest.skip(f"{backend} does not run here")
    try:
        loaded = polyquant.load(mixtral, backend, device="cpu", **options_of(handle))
    except ConfigError as error:
        assert "model.layers.0.mlp.experts.gate_up_proj" in str(error)
        print(backend, "refuses:", error)
        return
    experts = [layer for layer in loaded.initial_layers if layer.role == "experts"]
    assert experts
    report = polyquant.verify(loaded)
    if all(layer.quantized for layer in experts):
        assert report.passed, report.failures
        return
    coverage = next(check for check in report.failures if check.name == "coverage")
    assert "model.layers.0.mlp.experts.gate_up_proj" in coverage.found
    print(backend, coverage.found)


@FUSED
@pytest.mark.parametrize("backend", polyquant.backends().names)
def test_a_plan_says_what_becomes_of_experts(mixtral, backend):
    """Of every backend, also those that need a checkpoint first."""
    try:
        plan = polyquant.plan(mixtral, backend, device="cpu", **options_of(polyquant.backend(backend)))
    except PolyquantError as error:
        print(backend, error)
        assert re.search("experts|does not plan from shapes|makes none of a dense model", str(error))
        return
    experts = [tensor for tensor in plan.tensors if tensor.role == "experts"]
    assert experts
    assert all(tensor.quantized or "fused expert weights" in tensor.reason for tensor in experts)
    print(backend, {tensor.scheme for tensor in experts})
