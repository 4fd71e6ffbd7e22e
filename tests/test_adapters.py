"""Adapters of every shape that PEFT has, on quantized bases: loaded, verified, merged, or refused before any work."""

import json
import os
import subprocess

import huggingface_hub
import peft
import polyquant
import pytest
import torch
from polyquant.errors import AdapterError, ConfigError, MergeRefused, UnsupportedOperation
from polyquant.support.processes import import_path
from polyquant.testing import warm
from polyquant.testing.models import tiny_model
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.usefixtures("rowwise"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # of PEFT, in its own calls
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]
TOKENS = list(range(5, 40))
HELD = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "norms saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "head and embedding": {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 7]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {name: tiny_model(name, folder) for name in ("llama", "llama-tied")}


def write_adapter(model, out, *, vocabulary=0, **config):
    """An adapter of random numbers, saved by PEFT; returns the logits of the dense model with it."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if vocabulary:
        dense.resize_token_embeddings(vocabulary, mean_resizing=False)
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 2, "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    adapted = peft.get_peft_model(dense, peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1 * float(parameter.std().nan_to_num(1) or 1))
    adapted.save_pretrained(out)
    return logits_of(adapted.eval())


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].float()


@pytest.mark.parametrize("model", ["llama", "llama-tied"])
@pytest.mark.parametrize("held", HELD)
def test_what_peft_holds_is_verified_and_merged(models, tmp_path, model, held):
    source = models[model]
    wanted = write_adapter(source, tmp_path / "adapter", **HELD[held])
    loaded = polyquant.load(source, "rowwise", device="cpu", compute_dtype="float32", adapter=tmp_path / "adapter")
    report = polyquant.verify(loaded)
    assert report.passed, report.failures
    with_adapter = loaded.logits(TOKENS)
    assert float((with_adapter - wanted).square().mean().sqrt()) < 0.1 * float(wanted.std())
    for into, expected in (("dense", wanted), ("dequantized", with_adapter)):
        polyquant.merge(
            source, tmp_path / "adapter", tmp_path / into, into, backend="rowwise", device="cpu",
            compute_dtype="float32",
        )  # fmt: skip
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / into, dtype=torch.float32)
        assert float((logits_of(merged) - expected).abs().max()) < 1e-3, into


# what PEFT cannot do with packed layers


ASKS = {
    "use_dora": ({"use_dora": True}, r"DoRA needs weights that PEFT can read, and those of rowwise are not"),
    "pissa": ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' takes .* packed by rowwise: leave"),
    "olora, all": ({"init_lora_weights": "olora", "target_modules": "all-linear"}, r"'olora' takes .* out of the base"),
    "saved whole": ({"modules_to_save": ["up_proj"]}, r"'up_proj' is to be trained as it is, .*skip=\['model.layers.0"),
    "a block saved whole": ({"modules_to_save": ["layers.1"]}, r"'layers.1' is to be trained as it is"),
    "a parameter": (
        {"target_parameters": ["mlp.down_proj.weight"]},
        r"'mlp.down_proj.weight' is to be trained as it is",
    ),
}


@pytest.fixture
def plain(models):
    return polyquant.load(models["llama"], "rowwise", device="cpu", compute_dtype="float32")


def lora(**config):
    config = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    return peft.LoraConfig(**config)


@pytest.mark.parametrize("asks", ASKS)
def test_what_packed_layers_cannot_give_is_refused_before_peft_begins(plain, asks):
    config, said = ASKS[asks]
    before = plain.logits(TOKENS)
    with pytest.raises(UnsupportedOperation, match=said):
        peft.get_peft_model(plain.model, lora(**config))
    assert torch.equal(plain.logits(TOKENS), before)
    adapted = peft.get_peft_model(plain.model, lora())
    with pytest.raises(UnsupportedOperation, match=said):
        adapted.add_adapter("second", lora(**config))
    assert list(adapted.peft_config) == ["default"]


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("safe", [False, True])
def test_peft_does_not_merge_into_packed_weights(plain, merge, safe):
    adapted = peft.get_peft_model(plain.model, lora()).eval()
    before = plain.logits(TOKENS)
    with pytest.raises(UnsupportedOperation, match=r"q_proj is packed by rowwise: merge with polyquant.merge"):
        getattr(adapted, merge)(safe_merge=safe)
    assert torch.equal(plain.logits(TOKENS), before)


def test_peft_merges_into_what_is_dense(plain):
    adapted = peft.get_peft_model(plain.model, lora(target_modules=["lm_head"])).eval()
    before = plain.logits(TOKENS)
    adapted.merge_adapter()
    assert torch.allclose(plain.logits(TOKENS), before, atol=1e-3)


def test_other_models_are_asked_nothing(models):
    dense = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    adapted = peft.get_peft_model(dense, lora(use_dora=True, modules_to_save=["up_proj"])).eval()
    before = logits_of(adapted)
    assert torch.allclose(logits_of(adapted.merge_and_unload()), before, atol=1e-3)


# several, and those of a hub


@pytest.fixture
def two(models, tmp_path):
    for name, targets in (("one", ["q_proj"]), ("two", ["v_proj"])):
        write_adapter(models["llama"], tmp_path / name, target_modules=targets)
    write_adapter(models["llama"], tmp_path / "both", target_modules=["q_proj", "v_proj"])
    return tmp_path / "one", tmp_path / "two"


def load(model, adapter):
    return polyquant.load(model, "rowwise", device="cpu", compute_dtype="float32", adapter=adapter)


def test_the_products_of_several_adapters_are_added(models, two):
    loaded = load(models["llama"], two)
    assert loaded.adapter == f"{two[0]}, {two[1]}"
    both = loaded.logits(TOKENS)
    for name, one in zip(("0", "1"), two, strict=True):
        loaded.model.set_adapter(name)
        assert torch.equal(loaded.logits(TOKENS), load(models["llama"], one).logits(TOKENS))
        assert not torch.equal(loaded.logits(TOKENS), both)
    loaded.model.base_model.set_adapter(["0", "1"])
    assert torch.equal(loaded.logits(TOKENS), both)
    report = polyquant.verify(loaded)
    assert report.passed, report.failures
    assert sum(layer.role == "adapter" for layer in report.layers) == 2 * 2 * 2


def test_the_command_line_takes_several_adapters(models, two, rowwise):
    environment = {**os.environ, "PYTHONPATH": f"{rowwise}{os.pathsep}{import_path()}"}
    flags = [word for adapter in two for word in ("--adapter", str(adapter))]
    command = [
        "run",
        str(models["llama"]),
        "-b",
        "rowwise",
        "--device",
        "cpu",
        "--max-new-tokens",
        "4",
        *flags,
        "water",
    ]
    ended = subprocess.run(
        [warm.interpreter(), "-m", "polyquant", *command], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    missing = subprocess.run(
        [warm.interpreter(), "-m", "polyquant", *command, "--adapter", "owner/absent"], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert missing.returncode == 2
    assert "owner/absent: no such folder here, not in the hub's cache" in " ".join(missing.stderr.split())


def test_adapters_that_bring_whole_modules_are_not_added(models, two, tmp_path):
    write_adapter(models["llama"], tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=r"whole brings whole tensors \(modules_to_save\).*load it alone"):
        load(models["llama"], [two[0], tmp_path / "whole"])


def test_a_hub_name_is_found_in_the_hubs_cache(models, two, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(AdapterError, match=r"owner/name: no such folder here, not in the hub's cache.*HF_HUB_OFFLINE"):
        load(models["llama"], "owner/name")
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    two[0].rename(repository / "snapshots" / "abc")
    found = load(models["llama"], "owner/name")
    assert found.adapter == "owner/name"
    assert not torch.equal(found.logits(TOKENS), load(models["llama"], ()).logits(TOKENS))


# adapters that do not fit


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"]},
    ],
)
@pytest.mark.parametrize(("vocabulary", "said"), [(390, r"390 tokens, 6 more than the 384"), (380, r"4 fewer than")])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_another_vocabulary_is_told_by_how_much(models, tmp_path, config, vocabulary, said):
    write_adapter(models["llama"], tmp_path / "adapter", vocabulary=vocabulary, **config)
    cure = r"resize_token_embeddings\(390\)" if vocabulary == 390 else "before tokens were added"
    with pytest.raises(AdapterError, match=rf"{said}.*{cure}"):
        load(models["llama"], tmp_path / "adapter")


def test_an_adapter_of_another_kind_is_refused(models, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(models["llama"])
    peft.get_peft_model(dense, peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"is a IA3 adapter of PEFT's, and LoRA"):
        load(models["llama"], tmp_path / "adapter")


# merging


def test_targets_of_a_merge_are_named_as_verbs_too_and_no_others(models, two, tmp_path):
    model = str(models["llama"])
    with pytest.raises(ConfigError, match=r"into must be one of dense, dequantized, requantized.*'dequantized'"):
        polyquant.merge(model, two[0], tmp_path / "out", "dequant", backend="rowwise", device="cpu")
    polyquant.merge(model, two[0], tmp_path / "out", "dequantize", backend="rowwise", device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    closest = load(model, two[0]).logits(TOKENS)
    assert torch.allclose(logits_of(merged), closest, atol=0.1)


def test_refused_merges_do_not_recommend_each_other(models, two, tmp_path):
    def refused(into):
        with pytest.raises(MergeRefused) as caught:
            polyquant.merge(
                str(models["llama"]), two[0], tmp_path / "out", into, backend="rowwise", device="cpu", threshold=-1
            )
        return str(caught.value)

    assert "--into dequantized" in refused("dense")
    assert "--into" not in refused("dequantized")
    assert "keep the adapter beside its base (--adapter)" in refused("dequantized")


# training


def test_adapters_that_no_gradient_reaches_are_named(models, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"water {number}"}) for number in range(8)))
    loaded = polyquant.load(models["llama"], "rowwise", device="cpu")
    loaded.model.model.layers[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), *inputs[1:]))
    tuned = polyquant.finetune(loaded, data, tmp_path / "out", rank=2, steps=2, batch_size=2, targets=("up_proj",))
    (note,) = [note for note in tuned.notes if "no gradient" in note]
    assert "model.layers.0.mlp.up_proj: they are as they began" in note
    assert "layers.1" not in note
