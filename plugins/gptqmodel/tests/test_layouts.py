"""Checkpoints in the layouts of other kernels, packed by the library's own code where it has some: the same layers."""

import numpy as np
import polyquant
import pytest
import torch
from gptqmodel.nn_modules.qlinear.gemv_fast_awq import pack_intweight
from gptqmodel.quantization.awq.utils.packing_utils import pack_awq_columns
from gptqmodel.utils.gemv import calculate_zeros_width
from gptqmodel.utils.marlin import marlin_permute_scales
from polyquant.errors import ModelError
from polyquant.plugin.packing import unpacked, unpacked_awq
from polyquant.testing.checkpoints import assert_verified
from polyquant.testing.models import tiny_model

TOKENS = [3, 4, 5, 6, 7, 8, 9]
UP = "model.layers.1.mlp.up_proj"


def load(path, **options):
    return polyquant.load(path, device="cpu", **options)


def marlin(codes):
    """int32 (in / 16, 2 * out) of codes (in, out), as a warp of marlin reads them: 32 threads, four tiles each."""
    (columns, rows), places = codes.shape, []
    for thread in range(32):
        first = []
        for half in (0, 1):
            for row in (2 * (thread % 4), 2 * (thread % 4) + 1, 2 * (thread % 4 + 4), 2 * (thread % 4 + 4) + 1):
                first.append(16 * row + thread // 4 + 8 * half)
        for tile in range(4):
            places.extend(place + 256 * tile for place in first)
    places = np.array(places).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].ravel()
    tiles = codes.numpy().astype(np.uint32).reshape(columns // 16, 16, rows // 16, 16).transpose(0, 2, 1, 3)
    ordered = tiles.reshape(-1, 1024)[:, places].reshape(columns // 16, rows * 16)
    words = np.zeros((columns // 16, rows * 2), dtype=np.uint32)
    for number in range(8):
        words |= ordered[:, number::8] << (4 * number)
    return torch.from_numpy(words.view(np.int32))


def to_marlin(tensors, module, group_size):
    codes = unpacked(tensors.pop(f"{module}.qweight").T, 4).T
    scales = tensors.pop(f"{module}.scales")
    columns, rows = codes.shape
    tensors[f"{module}.B"] = marlin(codes)
    tensors[f"{module}.s"] = marlin_permute_scales(scales, columns, rows, group_size)
    tensors[f"{module}.workspace"] = torch.zeros(rows // 128 * 16, dtype=torch.int32)
    del tensors[f"{module}.qzeros"], tensors[f"{module}.g_idx"]


def filled(parts, group_size, columns):
    """Scales or zero points (out, groups) with zeros up to the width of the layout."""
    whole = parts.new_zeros(len(parts), calculate_zeros_width(columns, group_size) * 8)
    whole[:, : parts.shape[1]] = parts
    return whole


def to_gemv(tensors, module, group_size, *, fast=False):
    codes, zeros = (unpacked_awq(tensors[f"{module}.{part}"]).T.int() for part in ("qweight", "qzeros"))
    columns = codes.shape[1]
    size = columns if group_size == -1 else group_size
    scales = filled(tensors[f"{module}.scales"].T, size, columns)
    zeros = filled(zeros, size, columns)
    if fast:
        tensors[f"{module}.qweight"] = pack_intweight(codes.contiguous(), interleave=4, kstride=64)
        tensors[f"{module}.qzeros"] = (-(scales * zeros.float())).half().T.contiguous()
        tensors[f"{module}.scales"] = scales.T.contiguous()
    else:
        tensors[f"{module}.qweight"] = pack_awq_columns(codes, 4)
        tensors[f"{module}.qzeros"] = pack_awq_columns(zeros, 4)
        tensors[f"{module}.scales"] = scales


CASES = [
    ("marlin", 128), ("marlin", 64), ("marlin", -1),
    ("gemv", 64), ("gemv", 128), ("gemv", -1),
    ("gemv_fast", 32), ("gemv_fast", 64), ("gemv_fast", 128),
]  # fmt: skip
STORED = {
    "marlin": {"checkpoint_format": "marlin", "is_marlin_format": True},
    "gemv": {"version": "GEMV"},
    "gemv_fast": {"version": "gemv_fast"},
}


@pytest.fixture
def made(folder, tmp_path, packing):
    """Layout and group size -> (a checkpoint in it, the ordinary one)."""

    def make(layout, group_size):
        dense, usual, other = tiny_model("qwen2", folder), tmp_path / "usual", tmp_path / "other"
        write = packing.write_gptq if layout == "marlin" else packing.write_awq
        for out in (usual, other):
            write(dense, out, group_size=group_size)

        def change(tensors):
            for module in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
                if layout == "marlin":
                    to_marlin(tensors, module, group_size)
                else:
                    to_gemv(tensors, module, group_size, fast=layout == "gemv_fast")

        packing.change_tensors(other, change)
        packing.change_stored(other, **STORED[layout])
        return other, usual

    return make


@pytest.mark.parametrize(("layout", "group_size"), CASES)
def test_layers_are_those_of_the_ordinary_layout(made, layout, group_size):
    other, usual = made(layout, group_size)
    for options in ({}, {"kernel": "packed"}):
        loaded, expected = load(other, **options), load(usual, **options)
        assert_verified(loaded)
        assert any(f"stored for the kernel {layout}" in note for note in loaded.notes)
        assert not any("stored for the kernel" in note for note in expected.notes)
        assert torch.equal(loaded.logits(TOKENS), expected.logits(TOKENS))
        mine, theirs = (dict(each.model.get_submodule(UP).named_parameters()) for each in (loaded, expected))
        mine |= dict(loaded.model.get_submodule(UP).named_buffers())
        theirs |= dict(expected.model.get_submodule(UP).named_buffers())
        assert mine.keys() == theirs.keys() and mine
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("layout", "damage", "words"),
    [
        ("marlin", lambda t: t.pop(f"{UP}.s"), f"{UP} cannot be read: s is missing; it has B, workspace"),
        ("marlin", lambda t: t.update({f"{UP}.B": t[f"{UP}.B"][:, :-2].contiguous()}), "B of a layer .* should be"),
        ("gemv", lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:, :4].contiguous()}),
         r"scales of a layer \(512, 256\) should be \(512, 16\) float, and is \(512, 4\) float16"),
        ("gemv_fast", lambda t: t[f"{UP}.qzeros"].add_(0.3), "qzeros are no zero points from 0 to 15 times its scales"),
    ],
)  # fmt: skip
def test_damage_is_told(made, packing, layout, damage, words):
    other, _ = made(layout, 64)
    packing.change_tensors(other, damage)
    with pytest.raises(ModelError, match=words):
        load(other)
