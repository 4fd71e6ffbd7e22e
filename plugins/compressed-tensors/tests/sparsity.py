"""2:4 sparse tensors as compressed-tensors wrote them: its mask, and what it chooses of each row."""

import json

import torch
from compressed_tensors.utils import pack_bitmasks
from polyquant.testing.checkpoints import changed_copy

SPARSITY = {
    "format": "sparse-24-bitmask", "sparsity_structure": "2:4", "global_sparsity": 0.5, "targets": ["Linear"],
    "ignore": ["lm_head"], "registry_requires_subclass": False,
}  # fmt: skip


def halved(weight):
    """Which two of each four weights are largest."""
    largest = weight.float().abs().unflatten(1, (-1, 4)).topk(2, dim=-1).indices
    return torch.zeros(*weight.shape[:1], weight.shape[1] // 4, 4).scatter(2, largest, 1).bool().flatten(1)


def make_sparse(tensors):
    """Leave half of each projection out."""
    for key in [key for key in tensors if key.endswith("proj.weight")]:
        weight, module = tensors.pop(key), key.removesuffix(".weight")
        mask = halved(weight)
        kept = weight.view(torch.uint8)[mask].view(weight.dtype) if weight.element_size() == 1 else weight[mask]
        tensors[f"{module}.compressed"] = kept.view(len(weight), -1).clone()
        tensors[f"{module}.bitmask"] = pack_bitmasks(mask)
        tensors[f"{module}.shape"] = torch.tensor(weight.shape).view(-1, 1)


def write_sparse(dense, out):
    """A checkpoint of a dense model with half of each projection, not quantized."""
    changed_copy(dense, out, make_sparse)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "dense", "sparsity_config": SPARSITY, "config_groups": {}
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    return out
