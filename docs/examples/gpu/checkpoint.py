"""The step `checkpoint:CANDIDATE`: a quantized checkpoint for a backend that reads and does not quantize while loading.

GPTQ and AWQ are rounded to nearest and packed here: what is looked at is reading and running them, not their quality.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import polyquant

BITS, GROUP = 4, 64
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 columns each nibble of a word holds
LAYERS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))
STORED: dict[str, common.Facts] = {
    "gptq": {
        "quant_method": "gptq", "bits": BITS, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq",
    },
    "awq": {"quant_method": "awq", "bits": BITS, "zero_point": True, "version": "gemm"},
}  # fmt: skip


def measure(arguments: common.Facts, note: common.Note) -> None:
    backend, preset = arguments["candidate"].split(":")
    dense, out = Path(arguments["model"]), Path(arguments["checkpoint"])
    shutil.rmtree(out, ignore_errors=True)
    started = perf_counter()
    info = polyquant.backend(backend).info
    if backend in STORED:
        pack(backend, dense, out, arguments["device"])
    elif info.capabilities.needs_calibration:
        raise common.NotRun("it quantizes with calibration text, and there is no packer for it here")
    else:
        polyquant.quantize(dense, backend, out, device=arguments["device"], **info.presets[preset])
    nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    note({"seconds": perf_counter() - started, "checkpoint_bytes": nbytes})


def pack(method: str, dense: Path, out: Path, device: str, group: int = GROUP) -> Path:
    """A checkpoint of `dense` in the layout of `method`, `group` rows a scale; returns `out`."""
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True)
    where: dict[str, str] = {}
    for path in sorted(dense.glob("model*.safetensors")):
        packed: dict[str, Any] = {}
        for name, weight in load_file(path).items():
            if name.endswith(LAYERS):
                module = name.removesuffix(".weight")
                packed |= {f"{module}.{short}": part for short, part in parts(method, weight.to(device), group)}
            else:
                packed[name] = weight
        save_file(packed, out / path.name, {"format": "pt"})
        where |= dict.fromkeys(packed, path.name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for path in dense.glob("*.json"):
        if path.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(path, out)
    stored = STORED[method] | {"group_size": group}
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": stored}, indent=1))
    return out


def parts(method: str, weight: Any, group: int) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of one packed layer; weight: (out, in)."""
    import torch

    codes, zeros, scales = rounded(weight.float().T, group, symmetric=method == "gptq")
    if method == "gptq":
        yield "qweight", words(codes, 0).cpu()
        yield "qzeros", words(zeros - 1, 1).cpu()  # its first layout stores zero points less one
        yield "g_idx", torch.arange(len(codes), dtype=torch.int32) // group
    else:
        yield "qweight", words(interleaved(codes), 1).cpu()
        yield "qzeros", words(interleaved(zeros), 1).cpu()
    yield "scales", scales.half().cpu()


def rounded(columns: Any, group: int, *, symmetric: bool) -> tuple[Any, Any, Any]:
    """Codes (in, out), zero points and scales (groups, out) of a weight (in, out), rounded to nearest."""
    import torch

    groups = columns.reshape(-1, group, columns.shape[1])
    low, high, most = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0), 2**BITS - 1
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / most).clamp(min=1e-8).half().float()
    zeros = torch.full_like(low, 2 ** (BITS - 1)) if symmetric else (-low / scales).round().clamp(0, most)
    codes = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, most)
    return codes.reshape(columns.shape).int(), zeros.int(), scales


def words(values: Any, axis: int) -> Any:
    """int32 words of eight 4-bit values each along `axis`, the first lowest."""
    import torch

    moved = values.movedim(axis, -1).long()
    eights = moved.reshape(*moved.shape[:-1], -1, 8)
    shifts = torch.arange(0, 32, BITS, device=values.device)
    word = (eights << shifts).sum(-1)
    word = torch.where(word >= 2**31, word - 2**32, word).int()
    return word.movedim(-1, axis).contiguous()


def interleaved(values: Any) -> Any:
    """Columns in the order in which AWQ's words hold them."""
    eights = values.reshape(len(values), -1, 8)
    return eights[:, :, list(AWQ_ORDER)].reshape(values.shape)


if __name__ == "__main__":
    common.step(measure)
