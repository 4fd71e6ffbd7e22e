"""GPTQ checkpoints written here from the format's description, without gptqmodel: what the reader is compared with."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pack(values, bits, axis):
    """int32 words of little-endian bits of `values` along `axis`."""
    values = np.moveaxis(values.numpy().astype(np.uint8), axis, -1)
    stream = np.unpackbits(values[..., None], axis=-1, bitorder="little", count=bits)
    stream = stream.reshape(*values.shape[:-1], -1)
    words = np.packbits(stream, axis=-1, bitorder="little").view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)))


def quantize(weight, bits, group_size, *, sym, order):
    """Codes (in, out), zero points and float16 scales (groups, out), group of each column, dequantized (out, in)."""
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
    zeros = torch.full_like(low, 2 ** (bits - 1)) if sym else (-low / scales).round().clamp(1, most)
    codes = (columns / scales[index] + zeros[index]).round().clamp(0, most)
    dequantized = (scales.float()[index] * (codes - zeros[index])).T
    return codes, zeros, scales, index.int(), dequantized.contiguous()


def write(dense, out, *, bits=4, group_size=64, layout="gptq", sym=True, order=False, keep=()):
    """A checkpoint of the model in `dense`, and a dense one of what its weights stand for beside it.

    keep: layer names that stay dense.
    """
    tensors, equal = load_file(dense / "model.safetensors"), {}
    packed = dict(tensors)
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if not module.endswith(LAYERS) or module.endswith(keep or "-"):
            continue
        codes, zeros, scales, index, equal[name] = quantize(weight, bits, group_size, sym=sym, order=order)
        del packed[name]
        packed[f"{module}.qweight"] = pack(codes, bits, 0)
        packed[f"{module}.qzeros"] = pack(zeros - 1 if layout == "gptq" else zeros, bits, 1)
        packed[f"{module}.scales"] = scales
        packed[f"{module}.g_idx"] = index
    stored = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": order, "sym": sym}
    for folder, content in ((out, packed), (out.with_name(out.name + "-dense"), tensors | equal)):
        shutil.copytree(dense, folder)
        save_file(content, folder / "model.safetensors", {"format": "pt"})
    change_config(out, quantization_config=stored | {"checkpoint_format": layout})
    return out


def change_config(folder, **values):
    """Sets values in config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | values
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def packing():
    """The functions above: tests are imported without their folder."""
    return SimpleNamespace(write=write, change_config=change_config)
