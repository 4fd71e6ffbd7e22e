"""Mixtures whose experts a checkpoint holds one by one, packed (Kimi K2 is one): kept so, as the library reads them."""

import json
import shutil

import polyquant
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from polyquant.errors import ModelError, UnsupportedOperation
from polyquant.plugin.layers import LinearExperts
from polyquant.testing.checkpoints import assert_verified, changed_copy, without
from polyquant.testing.models import ONE_BY_ONE, SIZES, tiny_model, write_random
from polyquant.testing.reference import logits_by_transformers
from polyquant_compressed_tensors._library import quantization_scheme
from polyquant_compressed_tensors.options import CompressedTensorsOptions
from safetensors.torch import load_file, save_file

from .conftest import load

TOKENS = [3, 4, 5, 6, 7, 8, 9, 10]
EXPERTS_ONLY = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
ALL = ["lm_head", r"re:.*\.gate$"]
CASES = {
    "kimi": ("deepseek-v3", {"group_size": 32}, EXPERTS_ONLY),
    "int4-asymmetric": ("qwen3-moe", {"group_size": 64, "symmetric": False}, ALL),
    "int8": ("qwen3-moe", {"weights": "int8"}, ALL),
    "nvfp4": ("mixtral", {"weights": "nvfp4"}, ALL),
    "nvfp4-dynamic": ("qwen3-moe", {"weights": "nvfp4", "dynamic_activations": True}, ALL),
    "fp8-static": ("qwen3-moe", {"weights": "fp8", "strategy": "tensor", "static_activations": True}, ALL),
    "mxfp8": ("qwen3-moe", {"weights": "mxfp8"}, ALL),
}
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


def compressed(weight, options):
    """(a checkpoint's tensors of a weight rounded to nearest, what the library decompresses them to)."""
    scheme, groups = quantization_scheme(options), options.group_size
    args, whole = scheme.weights, None
    if options.weights == "nvfp4":
        whole = generate_gparam(weight.min(), weight.max()).view(1)
    parts = (
        weight.unflatten(1, (-1, groups)) if groups else weight if options.strategy == "channel" else weight.view(-1)
    )
    least, most = parts.amin(-1, keepdim=not groups), parts.amax(-1, keepdim=not groups)
    scale, zero = calculate_qparams(least, most, args, global_scale=whole)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero, "weight_global_scale": whole}
    library = BaseCompressor.get_value_from_registry(options.packed_format)
    tensors = library.compress({name: each for name, each in state.items() if each is not None}, scheme)
    dense = library.decompress(dict(tensors), scheme)["weight"]
    if options.weights == "nvfp4":  # the library goes through bfloat16
        values = unpack_fp4_from_uint8(tensors["weight_packed"], *weight.shape, dtype=torch.float32)
        exact = dequantize(values, tensors["weight_scale"].float(), args=args, global_scale=whole)
        torch.testing.assert_close(exact.bfloat16(), dense, rtol=2**-7, atol=0)
        dense = exact
        if options.dynamic_activations:
            tensors["input_global_scale"] = torch.tensor([500.0])
    if options.static_activations:
        tensors["input_scale"] = torch.tensor([0.03])
    return tensors, dense


@pytest.fixture(scope="module")
def made(folder):
    """Name of a case -> (its checkpoint, that of the dense model that the library makes of it)."""

    def make(name):
        out, dense = folder / f"experts-{name}", folder / f"dense-{name}"
        if out.exists():
            return out, dense
        (architecture, sizes), options, ignore = ONE_BY_ONE[CASES[name][0]], *CASES[name][1:]
        write_random(architecture, {**SIZES, **sizes}, dense, tiny_model("llama", folder))
        shutil.copytree(dense, out)
        stored, decompressed, options = {}, {}, CompressedTensorsOptions(**options)
        for key, tensor in load_file(dense / "model.safetensors").items():
            module = key.removesuffix(".weight")
            linear = ".experts." in key or (ignore is ALL and module.endswith("_proj"))
            if linear:
                tensors, decompressed[key] = compressed(tensor, options)
                stored |= {f"{module}.{part}": each.contiguous() for part, each in tensors.items()}
            else:
                stored[key] = decompressed[key] = tensor
        for path, tensors in ((out, stored), (dense, decompressed)):
            tensors = {key: tensor.clone() for key, tensor in tensors.items()}
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        content = json.loads((out / "config.json").read_text())
        group = quantization_scheme(options).model_dump(mode="json")
        content["quantization_config"] = {
            "quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ignore,
            "format": options.packed_format, "config_groups": {"group_0": group},
        }  # fmt: skip
        (out / "config.json").write_text(json.dumps(content))
        return out, dense

    return make


@pytest.mark.parametrize("kernel", ["library", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_mixtures_answer_as_what_the_library_decompresses(made, tmp_path, name, kernel):
    path, dense = made(name)
    whole = {"embeddings": "keep", "head": "keep", "compute_dtype": "float32"}
    loaded = load(path, kernel=kernel, **whole)
    assert_verified(loaded)
    stacks = [layer for layer in loaded.layers if layer.role == "experts"]
    assert stacks and all(layer.quantized for layer in stacks)
    assert any(isinstance(module, LinearExperts) for module in loaded.model.modules()) == (kernel == "library")
    if not loaded.config.rounds_activations or kernel == "packed":
        torch.testing.assert_close(loaded.logits(TOKENS), logits_by_transformers(dense, TOKENS), rtol=1e-3, atol=5e-4)
    saved = loaded.save(tmp_path / "saved")
    before, after = load_file(path / "model.safetensors"), load_file(saved / "model.safetensors")
    renamed = {each: each.replace("block_sparse_moe.gate", "mlp.gate") for each in before}  # as the model's
    assert set(renamed.values()) == set(after)
    for each, to in renamed.items():
        assert (before[each].shape, before[each].dtype) == (after[to].shape, after[to].dtype), each
        assert torch.equal(before[each].view(torch.uint8), after[to].view(torch.uint8)), each
    again = load(saved, kernel=kernel, **whole)
    assert torch.equal(again.logits(TOKENS), loaded.logits(TOKENS))


def test_every_expert_is_what_the_library_decompresses(made):
    path, dense = made("kimi")
    stack = load(path, kernel="library", compute_dtype="float32").model.model.layers[1].mlp.experts.gate_up_proj
    expected = load_file(dense / "model.safetensors")
    for number, found in enumerate(stack.expert_weights()):
        names = (f"model.layers.1.mlp.experts.{number}.{matrix}.weight" for matrix in ("gate_proj", "up_proj"))
        assert torch.equal(found, torch.cat([expected[name] for name in names]))


@pytest.mark.parametrize("kernel", ["decode", "pack_mm"])
def test_in_bfloat16_on_torch_s_matmuls_and_planned(made, kernel):
    path, _ = made("kimi")
    loaded = load(path, kernel=kernel, compute_dtype="bfloat16")
    planned = polyquant.plan(path, "compressed-tensors", device="cpu", kernel=kernel, compute_dtype="bfloat16")
    assert planned.weights_planned_bytes == sum(layer.stored_bytes for layer in loaded.layers)
    exact = load(path, kernel="library", compute_dtype="float32").logits(TOKENS)
    torch.testing.assert_close(loaded.logits(TOKENS), exact, rtol=0.05, atol=0.05)


def test_rounded_activations_of_experts(made):
    path, dense = made("nvfp4-dynamic")
    loaded = load(path, kernel="library", compute_dtype="float32")
    assert not torch.allclose(loaded.logits(TOKENS), logits_by_transformers(dense, TOKENS), rtol=1e-3, atol=1e-3)
    with pytest.raises(UnsupportedOperation, match="more than a weight and a bias"):
        loaded.model.dequantize()


def test_adapters_get_gradients_through_experts(made):
    from peft import LoraConfig, get_peft_model

    loaded = load(made("int4-asymmetric")[0], kernel="library", compute_dtype="float32")
    model = loaded.backend.prepare_for_training(loaded)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).train()
    ids = torch.tensor([TOKENS])
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [each.grad for name, each in model.named_parameters() if "lora_" in name]
    assert len(gradients) == 4
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def scaled(name, factor):
    return lambda tensors: tensors.update({name: tensors[name] * factor})


def test_matrices_of_an_expert_have_scales_of_their_own(made, tmp_path):
    """A scale for each of the two: the answers differ from those before, by what it is."""
    path, _ = made("nvfp4")
    name = "model.layers.1.block_sparse_moe.experts.2.w3"
    other = changed_copy(path, tmp_path / "changed", scaled(f"{name}.weight_global_scale", 2))
    before, after = (load(each, kernel="library", compute_dtype="float32").model for each in (path, other))
    before, after = (list(each.model.layers[1].mlp.experts.gate_up_proj.expert_weights()) for each in (before, after))
    half = len(before[2]) // 2
    assert torch.equal(after[2][half:] * 2, before[2][half:])
    assert torch.equal(after[2][:half], before[2][:half])
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize(
    ("case", "damage", "words"),
    [
        ("int8", without(f"{EXPERT}.weight_scale"), "expert 2: weight_scale of one of its matrices is missing"),
        ("nvfp4-dynamic", scaled(f"{EXPERT}.input_global_scale", 2),
         r"expert 2: its two matrices have input_global_scale \[500.0, 1000.0\], and are multiplied together"),
        ("int4-asymmetric", lambda tensors: tensors.update({f"{EXPERT}.weight_shape": torch.tensor([128, 250])}),
         r"expert 2: weight_shape says \[128, 256, 128, 250\], the model has \[128, 256, 128, 256\]"),
    ],
)  # fmt: skip
def test_damage_is_told_with_the_expert(made, tmp_path, case, damage, words):
    with pytest.raises(ModelError, match=rf"layers\.1\.mlp\.experts\.gate_up_proj cannot be read: {words}"):
        load(changed_copy(made(case)[0], tmp_path, damage))


def test_an_expert_that_is_missing_is_told(made, tmp_path):
    def drop(tensors):
        for each in [each for each in tensors if ".experts.3." in each]:
            del tensors[each]

    with pytest.raises(ModelError, match="experts should be 0 to 3, and expert 3 is missing"):
        load(changed_copy(made("int8")[0], tmp_path, drop))
