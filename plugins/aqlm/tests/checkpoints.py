"""A simple quantizer to make AQLM checkpoints with: residual k-means, without the method's calibrated search."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SAMPLED, ROUNDS = 4096, 5


def make(dense: Path, out: Path, *, books: int = 2, bits: int = 8, group: tuple[int, int] = (1, 8)) -> Path:
    """The dense checkpoint with every matrix below `layers` quantized. group: (out_group_size, in_group_size).

    Sizes that the groups do not divide are cut, so that such a checkpoint exists to be refused.
    """
    out.mkdir(parents=True)
    for file in dense.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if ".layers." in name and tensor.dim() == 2 and ".experts." not in name:
            short = name.removesuffix(".weight")
            parts = quantize(tensor.float(), books, bits, *group)
            tensors |= {f"{short}.{key}": part for key, part in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "aqlm", "num_codebooks": books, "nbits_per_codebook": bits, "out_group_size": group[0],
        "in_group_size": group[1], "linear_weights_not_to_quantize": ["lm_head.weight", "model.embed_tokens.weight"],
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    return out


def quantize(weight: Tensor, books: int, bits: int, rows: int, columns: int) -> dict[str, Tensor]:
    """Codes, codebooks and scales of a matrix: one scale for each row of groups, then k-means on what is left over."""
    weight = weight[: weight.shape[0] // rows * rows, : weight.shape[1] // columns * columns]
    grouped = weight.view(weight.shape[0] // rows, rows, -1, columns).swapaxes(1, 2)  # out groups, in groups, vector
    scales = grouped.pow(2).mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-8)
    left = (grouped / scales).reshape(-1, rows * columns).clone()
    generator = torch.Generator().manual_seed(0)
    codes, codebooks = [], []
    for _ in range(books):
        centers = k_means(left, 2**bits, generator)
        nearest = assign(left, centers)
        left -= centers[nearest]
        codes.append(nearest)
        codebooks.append(centers.view(-1, rows, columns))
    unsigned = torch.stack(codes, -1).view(*grouped.shape[:2], books)
    signed = torch.where(unsigned < 2 ** (bits - 1), unsigned, unsigned - 2**bits)
    dtype = torch.int8 if bits <= 8 else torch.int16
    return {"codes": signed.to(dtype), "codebooks": torch.stack(codebooks), "scales": scales}


def k_means(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` centers of a sample of `points`, (points, dimensions); padded with zeros where there are fewer points."""
    sample = points[torch.randperm(len(points), generator=generator)[: max(SAMPLED, count)]]
    if len(sample) <= count:
        return torch.cat([sample, sample.new_zeros(count - len(sample), sample.shape[1])])
    centers = sample[:count].clone()
    for _ in range(ROUNDS):
        nearest = assign(sample, centers)
        sums = torch.zeros_like(centers).index_add_(0, nearest, sample)
        sizes = torch.bincount(nearest, minlength=count).unsqueeze(1)
        centers = torch.where(sizes > 0, sums / sizes.clamp_min(1), centers)
    return centers


def assign(points: Tensor, centers: Tensor) -> Tensor:
    """Index of the nearest center of each point."""
    lengths = centers.pow(2).sum(1)
    return torch.cat([(lengths - 2 * (part @ centers.T)).argmin(1) for part in points.split(8192)])
