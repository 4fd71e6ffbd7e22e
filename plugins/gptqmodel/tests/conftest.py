"""Checkpoints written here from the formats' descriptions, without gptqmodel: what the reader is compared with."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from polyquant.plugin.process import kept_processes
from polyquant.testing import warm
from polyquant.testing.checkpoints import adapter_gradients
from polyquant.testing.models import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight columns, the ones whose weights lie in a word from its lowest bits up
TOKENS = [3, 4, 5, 6, 7, 8, 9]


def pack(values, bits, axis):
    """int32 words of little-endian bits of `values` along `axis`."""
    values = np.moveaxis(values.numpy().astype(np.uint8), axis, -1)
    stream = np.unpackbits(values[..., None], axis=-1, bitorder="little", count=bits)
    stream = stream.reshape(*values.shape[:-1], -1)
    words = np.packbits(stream, axis=-1, bitorder="little").view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)))


def pack_awq(codes):
    """int32 words (rows, columns / 8) of codes (rows, columns) below 16, in the order of version gemm."""
    ordered = codes.reshape(codes.shape[0], -1, 8)[..., list(AWQ_ORDER)]
    return pack(ordered.flatten(1), 4, 1)


def quantize(weight, bits, group_size, *, sym, least_zero, order=False):
    """Codes (in, out), zero points and float16 scales (groups, out), group of each column, dequantized (out, in).

    least_zero: the smallest fitted zero point that the format can hold.
    """
    in_features = weight.shape[1]
    size, most = in_features if group_size == -1 else group_size, 2**bits - 1
    index = torch.arange(in_features) // size
    if order:
        index = index[torch.randperm(in_features, generator=torch.Generator().manual_seed(0))]
    columns = weight.T
    groups = int(index.max()) + 1
    low = torch.stack([columns[index == group].amin(0) for group in range(groups)]).clamp(max=0)
    high = torch.stack([columns[index == group].amax(0) for group in range(groups)]).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / most).half()
    zeros = torch.full_like(low, 2 ** (bits - 1)) if sym else (-low / scales).round().clamp(least_zero, most)
    codes = (columns / scales[index] + zeros[index]).round().clamp(0, most)
    dequantized = (scales.float()[index] * (codes - zeros[index])).T
    return codes, zeros, scales, index.int(), dequantized.contiguous()


def write(dense, out, packed_layer, stored, keep):
    """A checkpoint of the model in `dense`, and a dense one of what its weights stand for beside it.

    packed_layer: weight -> (tensors by their names in the layer, dequantized weight). keep: layers that stay dense.
    """
    tensors, equal = load_file(dense / "model.safetensors"), {}
    packed = dict(tensors)
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if not module.endswith(LAYERS) or module.endswith(keep or "-"):
            continue
        parts, equal[name] = packed_layer(weight)
        del packed[name]
        packed |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    for folder, content in ((out, packed), (out.with_name(out.name + "-dense"), tensors | equal)):
        shutil.copytree(dense, folder)
        save_file(content, folder / "model.safetensors", {"format": "pt"})
    change_config(out, quantization_config=stored)
    return out


def write_gptq(dense, out, *, bits=4, group_size=64, layout="gptq", sym=True, order=False, keep=()):
    """`write` in the format of gptqmodel and auto-gptq."""

    def layer(weight):
        codes, zeros, scales, index, dequantized = quantize(
            weight, bits, group_size, sym=sym, least_zero=1, order=order
        )
        zeros = pack(zeros - 1 if layout == "gptq" else zeros, bits, 1)
        return {"qweight": pack(codes, bits, 0), "qzeros": zeros, "scales": scales, "g_idx": index}, dequantized

    stored = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": order, "sym": sym}
    return write(dense, out, layer, stored | {"checkpoint_format": layout}, keep)


def write_awq(dense, out, *, group_size=64, zero_point=True, keep=()):
    """`write` as autoawq does."""

    def layer(weight):
        codes, zeros, scales, _, dequantized = quantize(weight, 4, group_size, sym=not zero_point, least_zero=0)
        return {"qweight": pack_awq(codes), "qzeros": pack_awq(zeros), "scales": scales}, dequantized

    stored = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": zero_point, "version": "gemm"}
    return write(dense, out, layer, stored | {"modules_to_not_convert": list(keep) or None}, keep)


WRITERS = {"gptq": write_gptq, "awq": write_awq}


def change_config(folder, **values):
    """Sets values in config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | values
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def change_stored(folder, **values):
    """Sets values in the quantization_config of config.json."""
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(folder, quantization_config=stored | values)


def change_tensors(folder, change):
    """Calls `change` with the tensors of model.safetensors by name, and writes what it leaves."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def equal_dense(path):
    """The dense model of what the weights of a written checkpoint stand for."""
    return AutoModelForCausalLM.from_pretrained(path.with_name(path.name + "-dense")).eval()


def with_odd_sizes(folder, out):
    """A llama whose k_proj, 40 x 64, is of a size that torch's int4 matmul does not take."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tiny_model("llama", folder), out)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 40}
    LlamaForCausalLM(LlamaConfig.from_pretrained(out, intermediate_size=96, **sizes)).save_pretrained(out)
    return out


def assert_layers_multiply_with(dense, loaded, dtype):
    """Each layer is its dequantized one, to the rounding of scales and weights to `dtype`."""
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"):
        weight, layer = dense.get_submodule(name).weight, loaded.model.get_submodule(name)
        with torch.inference_mode():
            found = layer(torch.eye(layer.in_features, dtype=dtype)).float().T
        if layer.bias is not None:
            found = found - layer.bias.float()[:, None]
        torch.testing.assert_close(found, weight.data, rtol=0.02, atol=0.01 * weight.abs().max().item())


def assert_adapters_train_as_on(dense, loaded):
    """Adapters get the gradients that they get on the dense model, in bfloat16."""
    expected = adapter_gradients(dense, TOKENS)
    found = adapter_gradients(loaded.backend.prepare_for_training(loaded), TOKENS)
    assert found.keys() == {name for name in expected if "lora" in name}
    for name, gradient in found.items():
        similarity = torch.cosine_similarity(gradient.flatten().float(), expected[name].flatten(), dim=0)
        assert similarity > 0.99, name


@pytest.fixture(scope="package", autouse=True)
def one_process():
    """Checkpoints are made in one process, one after the other: its imports take most of the time."""
    with warm.as_executable(), kept_processes():
        yield


@pytest.fixture(scope="session")
def packing():
    """The functions above: tests are imported without their folder."""
    return SimpleNamespace(
        write_gptq=write_gptq, write_awq=write_awq, writers=WRITERS, change_config=change_config,
        change_stored=change_stored, change_tensors=change_tensors, equal_dense=equal_dense, with_odd_sizes=with_odd_sizes,
        assert_layers_multiply_with=assert_layers_multiply_with,
        assert_adapters_train_as_on=assert_adapters_train_as_on,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where tiny models are made, once a file of tests."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def checkpoint(folder, method):
    """int4 in groups of 64, of the llama model: symmetric for GPTQ, with zero points for AWQ."""
    return WRITERS[method](tiny_model("llama", folder), folder / f"{method}-int4")


@pytest.fixture
def copy(checkpoint, tmp_path):
    """Its files, to be changed."""
    return shutil.copytree(checkpoint, tmp_path / "copy")
