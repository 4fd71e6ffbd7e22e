"""AWQ checkpoints written here from the format's description, without gptqmodel: what the reader is compared with."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight columns, the ones whose weights lie in a word from its lowest bits up


def pack(codes):
    """int32 words (rows, columns / 8) of codes (rows, columns) below 16."""
    grouped = codes.long().reshape(codes.shape[0], -1, 8)[..., list(ORDER)]
    words = (grouped << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def quantize(weight, group_size, *, zero_point):
    """Codes (in, out), zero points and float16 scales (groups, out), dequantized (out, in)."""
    in_features = weight.shape[1]
    size = in_features if group_size == -1 else group_size
    grouped = weight.T.reshape(-1, size, weight.shape[0])
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    if not zero_point:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / 15).half()
    zeros = (-low / scales).round().clamp(0, 15) if zero_point else torch.full_like(low, 8)
    index = torch.arange(in_features) // size
    codes = (weight.T / scales[index] + zeros[index]).round().clamp(0, 15)
    return codes, zeros, scales, (scales.float()[index] * (codes - zeros[index])).T.contiguous()


def write(dense, out, *, group_size=64, zero_point=True, keep=()):
    """A checkpoint of the model in `dense` as autoawq stores one, and a dense one of what its weights stand for.

    keep: layer names that stay dense.
    """
    tensors, equal = load_file(dense / "model.safetensors"), {}
    packed = dict(tensors)
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if not module.endswith(LAYERS) or module.endswith(keep or "-"):
            continue
        codes, zeros, scales, equal[name] = quantize(weight, group_size, zero_point=zero_point)
        del packed[name]
        packed |= {f"{module}.qweight": pack(codes), f"{module}.qzeros": pack(zeros), f"{module}.scales": scales}
    stored = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": zero_point, "version": "gemm"}
    for folder, content in ((out, packed), (out.with_name(out.name + "-dense"), tensors | equal)):
        shutil.copytree(dense, folder)
        save_file(content, folder / "model.safetensors", {"format": "pt"})
    change_config(out, quantization_config=stored | {"modules_to_not_convert": list(keep) or None})
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
