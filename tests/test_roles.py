"""What each tensor is for, by its module, before and after a load; and models that a format does not let run."""

from collections import Counter

import polyquant
import pytest
from polyquant.errors import ConfigError
from polyquant.loading.trial import culprits, training
from polyquant.models import versions
from polyquant.models.weights import list_weights
from polyquant.testing.models import _tokenizer

SMALL = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128,
}  # fmt: skip
MAMBA = {**SMALL, "state_size": 8}
MODELS = {
    "Mamba": MAMBA,
    "Mamba2": {**MAMBA, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "Rwkv": {**SMALL, "attention_hidden_size": 64, "rescale_every": 0},
    "Rwkv that rescales": {**SMALL, "num_hidden_layers": 8, "attention_hidden_size": 64, "rescale_every": 2},
    "Falcon": {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "GPT2": {"vocab_size": 384, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "Mixtral": {**SMALL, "num_local_experts": 4},
    "Phimoe": {**SMALL, "num_local_experts": 4, "sliding_window": None},
    "DeepseekV3": {
        **SMALL, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 1,
        "topk_group": 1,
    },
}  # fmt: skip
FIVE = pytest.mark.skipif(not versions.VERSION_5, reason="these classes are of transformers 5")


def build(architecture):
    import torch
    import transformers

    sizes = MODELS[architecture]
    architecture = architecture.partition(" ")[0]
    config = getattr(transformers, f"{architecture}Config")(**sizes)
    name = {"GPT2": "GPT2LMHeadModel"}.get(architecture, f"{architecture}ForCausalLM")
    torch.manual_seed(0)
    return getattr(transformers, name)(config).float().eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    def make(architecture):
        path = folder / architecture
        if not path.exists():
            build(architecture).save_pretrained(path)
            _tokenizer().save_pretrained(path)
        return path

    return make


def runs(backend):
    if backend not in polyquant.backends().names or polyquant.backend(backend).problems("cpu"):
        pytest.skip(f"{backend} does not run here")


def roles_of(weights):
    return {weight.name: weight.role for weight in weights}


@FIVE
@pytest.mark.parametrize(
    ("architecture", "tensor", "role"),
    [
        ("Mamba", "backbone.layers.0.mixer.conv1d.weight", "convolution"),
        ("Mamba", "backbone.layers.0.mixer.A_log", "vector"),
        ("Mamba", "backbone.layers.0.mixer.in_proj.weight", "linear"),
        ("Mamba2", "backbone.layers.1.mixer.conv1d.weight", "convolution"),
        ("Rwkv", "rwkv.blocks.0.attention.time_mix_key", "vector"),
        ("Falcon", "transformer.h.0.mlp.dense_h_to_4h.weight", "linear"),
        ("GPT2", "transformer.h.0.attn.c_attn.weight", "linear"),
        ("Mixtral", "model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("Phimoe", "model.layers.0.mlp.router.weight", "custom"),
        ("Mixtral", "lm_head.weight", "head"),
        ("Mixtral", "model.embed_tokens.weight", "embedding"),
    ],
)
def test_a_role_follows_the_module(architecture, tensor, role):
    assert roles_of(list_weights(build(architecture)))[tensor] == role


def test_a_linear_of_a_single_output_is_one():
    import torch

    from polyquant.models.roles import role_of

    gate = torch.nn.Linear(64, 1)
    assert role_of(gate.weight, gate, head=None, is_buffer=False) == "linear"
    pooling = torch.nn.Module()
    pooling.probe = torch.nn.Parameter(torch.ones(1, 1, 64))
    assert role_of(pooling.probe, pooling, head=None, is_buffer=False) == "vector"
    pooling.mixing = torch.nn.Parameter(torch.ones(4, 8, 8))
    assert role_of(pooling.mixing, pooling, head=None, is_buffer=False) == "other"


@FIVE
@pytest.mark.parametrize("architecture", ["Mamba2", "Rwkv"])
@pytest.mark.parametrize("backend", ["fp8", "fouroversix", "hqq", "gguf"])
def test_no_convolution_is_taken_for_experts(models, architecture, backend):
    runs(backend)
    plan = polyquant.plan(models(architecture), backend, device="cpu", context=8)
    roles = Counter(tensor.role for tensor in plan.tensors)
    assert not roles["experts"]
    loaded = polyquant.load(models(architecture), backend, device="cpu")
    assert Counter(layer.role for layer in loaded.initial_layers if not layer.quantized) == Counter(
        tensor.role for tensor in plan.tensors if not tensor.quantized
    )
    assert not [check for check in polyquant.verify(loaded).failures if check.name != "sample"]


@FIVE
@pytest.mark.parametrize("backend", ["torchao", "quanto", "bitsandbytes", "hqq"])
def test_what_runs_dense_only_stays_dense_with_its_reason(models, backend):
    """Phi-3.5-MoE's router is a Linear by its class, and gives the experts to choose."""
    runs(backend)
    model = models("Phimoe")
    plan = polyquant.plan(model, backend, device="cpu", context=8, **({"group_size": 32} if backend == "hqq" else {}))
    loaded = polyquant.load(model, backend, device="cpu", **({"group_size": 32} if backend == "hqq" else {}))
    for tensors in (plan.tensors, loaded.initial_layers):
        router = next(tensor for tensor in tensors if tensor.name.endswith("layers.0.mlp.router.weight"))
        assert (router.quantized, router.reason) == (False, "its module does more than multiply, and runs dense only")
    assert {t.name for t in plan.tensors if t.quantized} == {t.name for t in loaded.initial_layers if t.quantized}
    assert [check.name for check in polyquant.verify(loaded).failures] in (
        [],
        ["coverage"],
        ["sample"],
        ["coverage", "sample"],
    )


@FIVE
@pytest.mark.parametrize(
    ("architecture", "backend", "options", "skip"),
    [
        ("Mamba", "bitsandbytes", {}, "dt_proj"),
        ("Mamba", "torchao", {}, "dt_proj"),
        ("DeepseekV3", "bitsandbytes", {"bits": 8}, "kv_b_proj"),
    ],
)
def test_what_cannot_run_is_refused_with_what_to_skip(models, architecture, backend, options, skip):
    runs(backend)
    with pytest.raises(
        ConfigError, match=rf"was loaded with {backend} and cannot run: .* keep them dense: skip=\('{skip}',\)"
    ) as caught:
        polyquant.load(models(architecture), backend, device="cpu", **options)
    assert caught.value.__cause__ is not None
    loaded = polyquant.load(models(architecture), backend, device="cpu", skip=(skip,), **options)
    assert any(layer.quantized for layer in loaded.initial_layers)
    assert loaded.logits([5, 6, 7]).isfinite().all()


def test_an_error_of_another_module_is_not_blamed_on_layers_beside_it(models):
    """Nor one that the device reports later than it happened."""
    import torch

    class Broken(torch.nn.Module):
        def forward(self, inputs):
            raise RuntimeError("no such activation here")

    model = build("Mixtral")
    attention = model.model.layers[0].self_attn
    quantized = {f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "o_proj")}
    attention.q_proj = torch.nn.Sequential(attention.q_proj, Broken())
    try:
        model(input_ids=torch.tensor([[5, 6, 7]]))
    except RuntimeError as error:
        assert culprits(model, error, {"model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.o_proj"}) == []
        assert culprits(model, error, quantized) == ["q_proj"]
    else:
        pytest.fail("it ran")
    runs("bitsandbytes")
    loaded = polyquant.load(models("Mamba2"), "bitsandbytes", device="cpu", bits=8)

    def late(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    next(loaded.model.modules()).get_submodule("backbone.layers.0.mixer.in_proj").register_forward_pre_hook(late)
    with pytest.raises(RuntimeError, match="CUDA error"), training(loaded):
        loaded.model(input_ids=torch.tensor([[5, 6, 7]]))


@FIVE
def test_what_cannot_train_is_refused_with_what_to_skip(models, tmp_path):
    """Mamba 2 has a way of its own for training, which reads the weight of one layer past its module."""
    runs("hqq")
    model, data, out = models("Mamba2"), tmp_path / "train.txt", tmp_path / "out"
    data.write_text("It rains.\n\nThe sun shines.\n")
    tuning = {"backend": "hqq", "device": "cpu", "steps": 1, "rank": 2}
    loaded = polyquant.load(model, "hqq", device="cpu")
    with pytest.raises(
        ConfigError, match=r"was loaded with hqq and cannot train: .* keep them dense: skip=\('out_proj',\)"
    ):
        polyquant.finetune(loaded, data, out, steps=1, rank=2)
    assert loaded.logits([5, 6, 7]).isfinite().all()
    assert not out.exists()
    assert polyquant.finetune(model, data, out, skip=("out_proj",), **tuning).steps == 1


def test_a_failure_that_is_about_no_layer_is_raised_as_it_is(models):
    runs("bitsandbytes")
    loaded = polyquant.load(models("Mamba2"), "bitsandbytes", device="cpu", bits=8)
    with pytest.raises(ZeroDivisionError), training(loaded):
        raise ZeroDivisionError


@FIVE
@pytest.mark.parametrize("backend", ["torchao", "quanto", "bitsandbytes", "hqq", "fp8"])
def test_weights_that_a_model_divides_in_place_stay_as_they_are(models, backend, tmp_path):
    """RWKV halves weights every few layers at its first forward pass, and the activations with them: packed or not."""
    import torch
    from transformers import AutoModelForCausalLM

    runs(backend)
    tokens, model = list(range(5, 25)), models("Rwkv that rescales")
    options = {"bits": 8} if backend in ("bitsandbytes", "hqq") else {}
    loaded = polyquant.load(model, backend, device="cpu", compute_dtype="float32", **options)
    found = loaded.logits(tokens)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = dense(input_ids=torch.tensor([tokens])).logits[0]
    assert (found - expected).norm() < 0.25 * expected.norm()
    again = polyquant.load(loaded.save(tmp_path / "out"), backend, device="cpu", compute_dtype="float32")
    assert torch.equal(again.logits(tokens), found)


def test_an_error_that_is_about_no_quantized_module_names_none():
    import torch

    model = build("GPT2")
    try:
        model(input_ids=torch.zeros(1, 4000, dtype=torch.long))
    except Exception as error:
        assert culprits(model, error, set()) == []
        assert culprits(model, error, {"transformer.h.0.attn.c_attn"}) == []
    else:
        pytest.fail("it ran")


@FIVE
@pytest.mark.parametrize("architecture", ["Mamba", "Mamba2", "Rwkv"])
def test_recurrent_models_are_written_and_read_back(models, architecture, bitsandbytes, tmp_path):
    path = polyquant.quantize(
        models(architecture),
        "bitsandbytes",
        tmp_path / "out",
        device="cpu",
        skip=("dt_proj",) if architecture == "Mamba" else (),
    )
    again = polyquant.load(path, device="cpu")
    report = polyquant.verify(again)
    assert report.memory.kv_cache_bytes_per_token == 0
    assert not [check for check in report.failures if check.name != "sample"]
