"""For backends' own tests: GGUF files of any block type, and such that somebody changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FLOAT16_AT = {  # byte positions of float16 fields, which random bytes would make NaN or infinite
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": (), "IQ1_M": (),
}  # fmt: skip
MODERATE = {"MXFP4": (1, 112, 8), "NVFP4": (4, 8, 16)}
"""kind -> how many bytes at the start are scales, the least of those that models have, how many: others overflow."""


def random_blocks(kind: str, count: int) -> Any:
    """GGUF blocks of random bytes whose values are finite, so that every field takes every value: (count, bytes)."""
    import numpy as np

    from polyquant.plugin.gguf import TYPES

    rng = np.random.default_rng(7)
    blocks = rng.integers(0, 256, (count, TYPES[kind].nbytes), dtype=np.uint8)
    for at in FLOAT16_AT.get(kind, (0,)):
        blocks[:, at : at + 2] = rng.normal(0, 0.02, (count, 1)).astype(np.float16).view(np.uint8)
    if kind == "IQ1_M":
        blocks[:, 55] &= 0x3F  # top nibble of the scale: no infinities
    if kind == "MXFP4":
        blocks[:, 0] %= 240  # an exponent; beyond, the reference overflows
    return blocks


def in_blocks_of(kind: str, path: Path, out: Path) -> Path:
    """A copy of a GGUF, in the folder `out`, in which the matrices of its layers are random blocks of another type."""
    import gguf

    from polyquant.plugin.gguf import TYPES

    def in_blocks(tensor: Any) -> tuple[Any, Any]:
        if not tensor.name.startswith("blk.") or len(tensor.shape) == 1:
            return tensor.data, tensor.tensor_type
        columns, rows = (int(size) for size in tensor.shape)
        data = random_blocks(kind, rows * columns // TYPES[kind].elements)
        if kind in MODERATE:
            count, least, values = MODERATE[kind]
            data[:, :count] = data[:, :count] % values + least
        return data.reshape(rows, -1), gguf.GGMLQuantizationType[kind]

    out.mkdir(parents=True)
    number = next(int(each) for each in gguf.LlamaFileType if each.name.startswith(f"MOSTLY_{kind}"))
    changes = {"general.file_type": number, "polyquant.options": None}  # the options are those of another file
    return rewritten_gguf(path, out / f"{kind}.gguf", changes, in_blocks)


def rewritten_gguf(
    path: Path, out: Path, changes: Mapping[str, Any], tensors: Callable[[Any], tuple[Any, Any] | None]
) -> Path:
    """A copy of a GGUF in the file `out`.

    changes: of the metadata, by key; None leaves one out. tensors: what a tensor of gguf's reader becomes, its data and
    type; None leaves it out.
    """
    import gguf

    reader, left = gguf.GGUFReader(path), dict(changes)
    before = reader.fields["general.architecture"].contents()
    architecture = left.pop("general.architecture", before)
    writer = gguf.GGUFWriter(out, architecture)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            value = left.pop(field.name, field.contents())
            if value is not None:
                name = field.name.replace(f"{before}.", f"{architecture}.")
                writer.add_key_value(name, value, *field.types[:2])
    kinds = {bool: gguf.GGUFValueType.BOOL, float: gguf.GGUFValueType.FLOAT32, int: gguf.GGUFValueType.UINT32}
    for name, value in left.items():
        if value is not None:
            writer.add_key_value(name, value, kinds[type(value)])
    for tensor in reader.tensors:
        if (new := tensors(tensor)) is not None:
            writer.add_tensor(tensor.name, new[0], raw_dtype=new[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
