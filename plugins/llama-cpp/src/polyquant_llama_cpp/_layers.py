"""Describes the tensors of a model in llama.cpp: those of the file, and what was laid out anew for this CPU."""

from __future__ import annotations

import re
from collections import Counter
from math import prod

from polyquant.plugin import REASONS, LayerInfo, Role
from polyquant.plugin.gguf import FLOAT_DTYPES, Entry

from polyquant_llama_cpp._runtime import LlamaModel

REPACKED = re.compile(r"(amx )?repack tensor (\S+)")
BUFFER = re.compile(r"load_tensors:\s*(\S+) model buffer size =\s*([\d.]+) MiB")
UNUSED = re.compile(r"unused tensor (\S+)")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
IN_FILE = "the file holds it as {}, no blocks"
PLAIN = "ggml CPU"


def describe_layers(model: LlamaModel) -> list[LayerInfo]:
    """One record for every tensor that llama.cpp loaded, under the file's name.

    An embedding that is the output head too is in memory twice where the head was repacked. What the new layout takes
    beyond the blocks is a buffer of its own, from llama.cpp's report of its buffers (to 0.01 MiB).
    """
    repacked, unused = repacked_tensors(model), set(UNUSED.findall(model.load_log.text()))
    loaded = [entry for name, entry in model.header.tensors.items() if name not in unused]
    layers = [_describe(entry, repacked.get(entry.name, ""), tied=_is_tied(model, entry.name)) for entry in loaded]
    sizes = extra_buffers(model)
    beyond = sum(sizes.values()) - sum(entry.nbytes for entry in loaded if entry.name in repacked)
    if beyond >= 2**14:  # what rounding to 0.01 MiB leaves is less
        reason = "what the layout for this CPU takes beyond the blocks"
        layers.append(
            LayerInfo(
                name=f"{' and '.join(sizes)} layout", shape=(beyond,), role="buffer", bits=8, scheme="uint8",
                stored_bytes=beyond, parts={"buffer": beyond}, device="cpu", quantized=False, reason=reason,
            )
        )  # fmt: skip
    return layers


def repacked_tensors(model: LlamaModel) -> dict[str, str]:
    """Tensor -> the buffer it was repacked into."""
    found = REPACKED.findall(model.load_log.text())
    return {name: "AMX" if amx else "CPU_REPACK" for amx, name in found}


def extra_buffers(model: LlamaModel) -> dict[str, int]:
    """Bytes of each weight buffer beside the file's own weights."""
    found = BUFFER.findall(model.load_log.text())
    return {name: round(float(size) * 2**20) for name, size in found if name not in ("CPU", "CPU_Mapped")}


def kernel(model: LlamaModel) -> str:
    """What multiplies with the weights, as llama.cpp names its buffers."""
    return " and ".join([PLAIN, *extra_buffers(model)])


def unlike_its_name(model: LlamaModel, file_type: str) -> str:
    """What the matrices are, in words, where most of them are of another block type than the file's; else empty."""
    weights: Counter[str] = Counter()
    for entry in model.header.tensors.values():
        if _role(entry) in ("linear", "experts"):
            weights[entry.type.name] += prod(entry.shape)
    if file_type == "file" or not weights or file_type.startswith(weights.most_common(1)[0][0]):
        return ""
    shares = (f"{count / weights.total():.0%} {name}" for name, count in weights.most_common())
    return f"the file calls itself {file_type}; its matrices are {', '.join(shares)}"


def _is_tied(model: LlamaModel, name: str) -> bool:
    return name == EMBEDDING and HEAD not in model.header.tensors


def _describe(entry: Entry, buffer: str, *, tied: bool) -> LayerInfo:
    block, role = entry.type, _role(entry)
    parts = {"blocks": entry.nbytes} | ({f"{buffer} copy for the output head": entry.nbytes} if buffer and tied else {})
    dense = IN_FILE.format(block.name) if role in ("linear", "experts") else REASONS[role]
    return LayerInfo(
        name=entry.name, shape=entry.shape, role=role, bits=block.bits, scheme=FLOAT_DTYPES.get(block.name, block.name),
        stored_bytes=sum(parts.values()), parts=parts, device="cpu", quantized=block.packed,
        kernel=(f"ggml {buffer}" if buffer else PLAIN) if block.packed else "", reason="" if block.packed else dense,
    )  # fmt: skip


def _role(entry: Entry) -> Role:
    if len(entry.shape) == 1:
        return "vector"
    if entry.name == HEAD:
        return "head"
    if "_embd" in entry.name or entry.name.startswith("token_types"):
        return "embedding"
    return "experts" if len(entry.shape) > 2 and "_exps" in entry.name else "linear"
