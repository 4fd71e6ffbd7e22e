"""Checkpoints of VPTQ, SpQR and EXL3, made of dense models; their own makers need GPUs and calibration.

A layer that a format has no place for is written as nothing that could be read, so that readers have it to refuse.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from math import log2
from pathlib import Path
from typing import Any

import torch
from polyquant.models.resolve import resolve_dense
from safetensors.torch import load_file, save_file
from torch import Tensor

Made = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""A layer's tensors, and what its checkpoint's config has of it."""


def make(dense: Path, out: Path, convert: Callable[[Tensor], Made], config: Callable[[dict[str, Any]], Any]) -> Path:
    """The matrices of the blocks as `convert` makes them. config: of what layers' configs are -> quantization_config."""
    source = resolve_dense(str(dense)).path
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
    tensors, layers = dict[str, Tensor](), dict[str, Any]()
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if ".layers." not in name or tensor.dim() != 2 or ".experts." in name:
            tensors[name] = tensor
            continue
        made, layers[module] = convert(tensor.float())
        tensors |= {f"{module}.{short}": part.contiguous() for short, part in made.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((out / "config.json").read_text())
    settings["quantization_config"] = config(layers)
    (out / "config.json").write_text(json.dumps(settings))
    return out


def words_of(codes: Tensor, bits: int) -> Tensor:
    """Codes in 32-bit words, the first in the lowest bits; bit by bit, as the format is defined. int32."""
    each = (codes[..., None] >> torch.arange(bits)) & 1
    flat = each.flatten(-2)
    whole = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 32)).unflatten(-1, (-1, 32))
    return (whole << torch.arange(32)).sum(-1).to(torch.uint32).view(torch.int32)


def vptq_layer(weight: Tensor, bits: int = 2) -> Made:
    """Vectors of `8 / bits` rows, nearest of 64 of the matrix's own; of what is left, again; inputs out of order.

    Of 12 bits of indices: vectors of 12, 6, 4 and 3 rows are 1, 2, 3 and 4 bits a weight.
    """
    (rows, columns), length, count = weight.shape, 12 // bits, 64
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    scale = weight.std(0) + 1e-6
    sorted_columns = (weight / scale)[:, order]
    padded = torch.nn.functional.pad(sorted_columns, (0, 0, 0, -rows % length))
    vectors = padded.view(-1, length, columns).transpose(1, 2)  # (vectors, columns, length)
    chosen = torch.randperm(vectors.shape[0] * columns, generator=torch.Generator().manual_seed(1))
    chosen = chosen.repeat(-(-count // len(chosen)))[:count]

    def nearest(values: Tensor) -> tuple[Tensor, Tensor]:
        table = values.reshape(-1, length)[chosen].half().float()
        near = [(2 * some @ table.T - table.square().sum(-1)).argmax(-1) for some in values.split(64)]
        return table, torch.cat(near)

    main, first = nearest(vectors)
    residual, second = nearest(vectors - main[first])
    bits_of_index = int(log2(count))
    tensors = {
        "centroids.weight": main.half().view(1, -1), "res_centroids.weight": residual.half().view(1, -1),
        "indices": words_of((second << bits_of_index | first)[None], 2 * bits_of_index),
        "perm": order.to(torch.uint16).view(torch.int16),
        "weight_scale": scale.half(), "weight_bias": torch.zeros(columns).half(),
    }  # fmt: skip
    return tensors, {
        "vector_lens": [-1, length], "num_centroids": [-1, count], "num_res_centroids": [-1, count], "group_num": 1,
        "group_size": columns, "outlier_size": 0, "enable_norm": True, "enable_perm": True, "is_indice_packed": True,
        "indices_as_float": False, "in_features": columns, "out_features": rows, "bias": False,
    }  # fmt: skip


def make_vptq(dense: Path, preset: str, out: Path) -> Path:
    bits = int(preset.removeprefix("bits=").removesuffix("bit"))
    return make(
        dense, out, lambda weight: vptq_layer(weight, bits),
        lambda layers: {"quant_method": "vptq", "config_for_layers": layers, "shared_layer_config": {}},
    )  # fmt: skip


def spqr_layer(weight: Tensor, *, by_blocks: bool = False) -> Made:
    """Each 16 weights of a row by their range, their scales and zero points by the tile's; the rest of large errors.

    by_blocks: outliers by blocks of 16 rows, in turn (PTCSR), instead of by rows (CSR).
    """
    rows, columns = weight.shape
    if rows % 16 or columns % 16:
        tensors = {part: torch.zeros(1, dtype=torch.int32) for part in ("row_offsets", "col_vals", "in_perm")}
        return {"dense_weights": torch.zeros(1, dtype=torch.int64), **tensors}, {
            "dense_weights": 1,
            **dict.fromkeys(tensors, 1),
        }
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    own = weight[:, order]
    tiles = own.view(rows // 16, 16, columns // 16, 16).transpose(1, 2)  # (tile rows, tile columns, rows, columns)
    least, most = tiles.amin(-1), tiles.amax(-1)
    scale = (most - least).clamp_min(1e-5) / 7
    zero = -least / scale

    def second(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        step = ((high - low) / 7).clamp_min(1e-4).half()
        offset = (-low / step.float()).half()
        codes = (values / step.float() + offset.float()).round().clamp(0, 7)
        return codes.long(), step, offset, (step * (codes.half() - offset)).float()

    scale_codes, scale_step, scale_zero, scale = second(scale)
    zero_codes, zero_step, zero_zero, zero = second(zero)
    codes = (tiles / scale[..., None] + zero[..., None]).round().clamp(0, 7).nan_to_num(0)
    statistics = torch.stack([scale_step, zero_step, scale_zero, zero_zero], -1).view(rows // 16, columns // 16, 4)
    parts = statistics.view(torch.uint8).long().repeat_interleave(2, -1)
    words = scale_codes | zero_codes << 3 | parts << 54
    for place in range(16):
        words |= codes[..., place].long() << (6 + 3 * place)
    made = scale[..., None] * (codes - zero[..., None])
    left = (own - made.transpose(1, 2).reshape(rows, columns)).half()
    entries = [[(column, left[row, column]) for column in (row % columns, (row + 5) % columns)] for row in range(rows)]
    if by_blocks:
        flat = [entries[block * 16 + row][turn] for block in range(rows // 16) for turn in (0, 1) for row in range(16)]
        offsets = torch.arange(rows // 16 + 1) * 32
    else:
        flat, offsets = [entry for row in entries for entry in row], torch.arange(rows + 1) * 2
    values = torch.stack([value for _, value in flat]).view(torch.int16).long() & 0xFFFF
    both = values << 16 | torch.tensor([column for column, _ in flat])
    tensors = {
        "dense_weights": words.flatten(), "row_offsets": offsets.int(),
        "col_vals": both.to(torch.uint32).view(torch.int32),
        "in_perm": order.to(torch.uint16).view(torch.int32),
    }  # fmt: skip
    return tensors, {part: len(tensor) for part, tensor in tensors.items()}


def make_spqr(dense: Path, preset: str, out: Path) -> Path:
    def config(layers: dict[str, Any]) -> dict[str, Any]:
        shapes = {f"{name}.{part}.shape": length for name, own in layers.items() for part, length in own.items()}
        return {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16, "shapes": shapes}

    return make(dense, out, spqr_layer, config)


def exl3_layer(weight: Tensor, bits: int = 4, codebook: str = "") -> Made:
    """Any states at all, of a size that answers stay whole with: the trellis is searched for on GPUs."""
    rows, columns = weight.shape
    if rows % 128 or columns % 128:
        nothing = {"trellis": torch.zeros(1, 1, 16, dtype=torch.int16), "suh": torch.ones(columns).half()}
        return nothing | {"svh": torch.ones(rows).half()}, {}
    chance = torch.Generator().manual_seed(rows + columns)
    trellis = torch.randint(-(2**15), 2**15, (columns // 16, rows // 16, 16 * bits), generator=chance)
    signs = torch.randint(0, 2, (rows + columns,), generator=chance) * 2 - 1
    tensors = {
        "trellis": trellis.to(torch.int16), "suh": signs[:columns].half(), "svh": (signs[columns:] * columns**-0.5).half(),
    }  # fmt: skip
    if codebook:
        number = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}[codebook]
        tensors[codebook] = torch.tensor(number - 2**32, dtype=torch.int32)
    return tensors, {}


def make_exl3(dense: Path, preset: str, out: Path) -> Path:
    bits = int(preset.removeprefix("bits=").removesuffix("bit"))
    return make(
        dense, out, lambda weight: exl3_layer(weight, bits),
        lambda layers: {"quant_method": "exl3", "version": "0.0.6", "bits": float(bits), "head_bits": 6},
    )  # fmt: skip
