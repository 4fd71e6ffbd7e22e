"""Which tensor of a GGUF belongs where in transformers' model, for the architectures that only rename and reorder rows.

llama.cpp's converter permutes the rows of q and k for llama models, and adds one to the norms of Gemma and Nemotron;
the reverse is transformers.modeling_gguf_pytorch_utils (TENSOR_PROCESSORS). Rows are whole runs of blocks, so they are
reordered packed. Architectures whose values would have to be split, joined or transposed are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from polyquant.errors import ModelError
from polyquant.plugin.gguf import Entry, Header


class Rules(NamedTuple):
    """How an architecture's tensors differ from transformers'."""

    model_type: str  # transformers'
    permutes: bool = False  # the rows of attn_q and attn_k
    norm_offset: float = 0.0  # what the file's norms have more


ARCHITECTURES = {
    "llama": Rules("llama", permutes=True),
    "qwen2": Rules("qwen2"),
    "qwen3": Rules("qwen3"),
    "phi3": Rules("phi3"),
    "starcoder2": Rules("starcoder2"),
    "stablelm": Rules("stablelm"),
    "gemma2": Rules("gemma2", norm_offset=1.0),
    "gemma3": Rules("gemma3_text", norm_offset=1.0),
    "nemotron": Rules("nemotron", norm_offset=1.0),
}
ROPE_FACTORS = "rope_freqs.weight"


class Placed(NamedTuple):
    """A tensor of the file and what is done to it on its way."""

    entry: Entry
    heads: int = 0  # llama: heads whose rows are permuted; 0: none
    offset: float = 0.0  # to take off

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape


def rules_of(header: Header) -> Rules:
    """Raises ModelError for an architecture that cannot be loaded packed, or a variant of one."""
    name, file = header.architecture, header.path.name
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{file} has the architecture {name!r}; this backend reads {', '.join(ARCHITECTURES)}. "
            "For another, use llama.cpp, or load the original model with another backend"
        )
    if (experts := header.number("expert_count") or 0) > 0:
        raise ModelError(f"{file} is a mixture of {experts} experts; this backend reads dense models only")
    return ARCHITECTURES[name]


def gguf_names(architecture: str, blocks: int, names: Iterable[str]) -> dict[str, str]:
    """transformers' tensor name -> GGUF's, where the architecture has one: llama.cpp's table, from the gguf package."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (arch,) = (key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    known = get_tensor_name_map(arch, blocks)
    found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    return {name: short for name, short in found.items() if short is not None}


def place(header: Header, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Placed]:
    """transformers' tensor name -> the file's tensor for it.

    shapes: of every parameter of the model, tied ones left out. Raises ModelError where a tensor is missing, left
    over, or of another shape.
    """
    rules, file = rules_of(header), header.path.name
    blocks = header.number("block_count")
    if blocks is None or blocks > len(header.tensors):
        raise ModelError(f"{file}: {header.architecture}.block_count is {blocks}; fetch or write the file again")
    wanted = gguf_names(header.architecture, blocks, shapes)
    missing = [name for name in shapes if wanted.get(name) not in header.tensors]
    if missing:
        raise ModelError(
            f"{file} lacks {len(missing)} tensors of the model: {_shown(missing)}; fetch or write it again"
        )
    ignored = {ROPE_FACTORS} if header.architecture == "llama" else set()
    left = set(header.tensors) - {wanted[name] for name in shapes} - ignored
    if left:
        raise ModelError(
            f"{file} has {len(left)} tensors that transformers' {rules.model_type} has no place for: "
            f"{_shown(sorted(left))}; load the original model instead"
        )
    placed = {}
    for name, shape in shapes.items():
        entry = header.tensors[wanted[name]]
        if entry.shape != tuple(shape):
            raise ModelError(f"{file}: {entry.name} has the shape {entry.shape}, its metadata say {tuple(shape)}")
        offset = rules.norm_offset if entry.name.endswith("norm.weight") else 0.0
        placed[name] = Placed(entry, _permuted_heads(header, rules, entry), offset)
    return placed


def _permuted_heads(header: Header, rules: Rules, entry: Entry) -> int:
    if not rules.permutes or (".attn_q." not in entry.name and ".attn_k." not in entry.name):
        return 0
    heads = header.number("attention.head_count")
    if ".attn_k." in entry.name:
        heads = header.number("attention.head_count_kv") or heads
    if not heads or entry.shape[0] % (2 * heads):
        raise ModelError(
            f"{header.path.name}: {entry.name} has {entry.shape[0]} rows, which are not {heads} heads; "
            "its metadata are damaged"
        )
    return heads


def _shown(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
