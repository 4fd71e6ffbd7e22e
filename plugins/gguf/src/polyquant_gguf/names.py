"""Which tensors of a GGUF belong where in transformers' model, for the architectures that only rename and reorder rows.

llama.cpp's converter permutes the rows of q and k for llama models, adds one to the norms of Gemma and Nemotron, and
has the gates and the ups of experts in stacks of their own; the reverse is transformers.modeling_gguf_pytorch_utils
(TENSOR_PROCESSORS). Rows are whole runs of blocks, so they are reordered packed. Architectures whose values would have
to be split, joined along columns or transposed are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from polyquant.errors import ModelError
from polyquant.plugin.gguf import BlockType, Entry, Header


class Rules(NamedTuple):
    """How an architecture's tensors differ from transformers'."""

    model_type: str  # transformers'
    permutes: bool = False  # the rows of attn_q and attn_k
    norm_offset: float = 0.0  # what the file's norms have more
    alternates: bool = False  # rows of gates and ups in the model, whose experts are (experts, in, out)


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
    "olmo2": Rules("olmo2"),
    "granite": Rules("granite", permutes=True),
    "command-r": Rules("cohere"),
    "gemma": Rules("gemma", norm_offset=1.0),
    "smollm3": Rules("smollm3", permutes=True),
    "ernie4_5": Rules("ernie4_5"),
    "seed_oss": Rules("seed_oss"),
    "arcee": Rules("arcee", permutes=True),
}
MIXTURES = {
    "llama": Rules("mixtral", permutes=True),
    "qwen2moe": Rules("qwen2_moe"),
    "qwen3moe": Rules("qwen3_moe"),
    "gpt-oss": Rules("gpt_oss", alternates=True),
    "olmoe": Rules("olmoe"),
}
"""Architectures of files with experts."""
ROPE_FACTORS = "rope_freqs.weight"
ROUTERS = ".ffn_gate_inp"
"""Of experts, and of a shared one: numbers in every file, never blocks."""
SHARED_GATE, SHARED_GATE_IN_FILE = "shared_expert_gate.weight", "ffn_gate_inp_shexp.weight"
"""A linear layer of one row, which a file has as a vector."""
_STACK = re.compile(r"(?P<experts>.*\.experts)\.(?P<matrix>gate_up_proj|down_proj)(?P<bias>_bias)?$")
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""transformers' matrix of all experts -> the file's stacks for it."""


class Placed(NamedTuple):
    """A tensor of the model, and what is done to the file's on their way."""

    entries: tuple[Entry, ...]  # several: rows of each expert that are put together
    shape: tuple[int, ...]  # of the model's tensor
    heads: int = 0  # llama: heads whose rows are permuted; 0: none
    offset: float = 0.0  # to take off
    is_stack: bool = False  # matrices of experts
    alternates: bool = False  # rows of the entries alternate, else they follow each other

    @property
    def entry(self) -> Entry:
        """The first one."""
        return self.entries[0]

    @property
    def type(self) -> BlockType:
        return self.entry.type

    @property
    def is_transposed(self) -> bool:
        """Whether the model's experts are (experts, in_features, out_features)."""
        return self.is_stack and self.alternates

    @property
    def holds_blocks(self) -> bool:
        """Whether it can be blocks in the model; else it is numbers, such as a vector or a router."""
        is_plain = ROUTERS in self.entry.name or self.entry.name.endswith((".bias", "norm.weight"))
        return len(self.shape) > 1 and not is_plain

    @property
    def shape_in_file(self) -> tuple[int, ...]:
        """Of each of the entries."""
        if self.entry.name.endswith(SHARED_GATE_IN_FILE):
            return self.shape[1:]
        first, *others = (self.shape[0], self.shape[2], self.shape[1]) if self.is_transposed else self.shape
        return (first, others[0] // len(self.entries), *others[1:]) if len(self.entries) > 1 else (first, *others)


def rules_of(header: Header) -> Rules:
    """Raises ModelError for an architecture that cannot be loaded packed, or a variant of one."""
    name, file, experts = header.architecture, header.path.name, header.number("expert_count") or 0
    known = MIXTURES if experts > 0 else ARCHITECTURES
    if name not in known:
        what = f"the architecture {name!r}" + (f" with {experts} experts" if experts > 0 else "")
        mixtures = f" and, with experts, {', '.join(MIXTURES)}"
        raise ModelError(
            f"{file} has {what}; this backend reads {', '.join(ARCHITECTURES)}{mixtures}. "
            "For another, use llama.cpp, or load the original model with another backend"
        )
    return known[name]


def rules_for(model_type: str) -> tuple[str, Rules] | None:
    """GGUF's architecture of transformers' models of a type; None where this backend has none."""
    for known in (ARCHITECTURES, MIXTURES):
        for name, rules in known.items():
            if rules.model_type == model_type:
                return name, rules
    return None


def gguf_names(architecture: str, blocks: int, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """transformers' tensor name -> GGUF's, where the architecture has them: llama.cpp's table, in the gguf package."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (arch,) = (key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    known = get_tensor_name_map(arch, blocks)
    found = dict[str, tuple[str, ...]]()
    for name in names:
        if stack := _STACK.match(name):
            suffix = ".bias" if stack["bias"] else ".weight"
            short = [known.get_name(f"{stack['experts']}.{part}") for part in PARTS[stack["matrix"]]]
        else:
            suffix = ".weight" if name.endswith(".sinks") else ""
            short = [known.get_name(name, try_suffixes=(".weight", ".bias"))]
        if None not in short:
            found[name] = tuple(f"{each}{suffix}" for each in short)
    return found


def place(header: Header, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Placed]:
    """transformers' tensor name -> the file's tensors for it.

    shapes: of every parameter of the model, tied ones left out. Raises ModelError where a tensor is missing, left
    over, or of another shape.
    """
    rules, file = rules_of(header), header.path.name
    blocks = header.number("block_count")
    if blocks is None or blocks > len(header.tensors):
        raise ModelError(f"{file}: {header.architecture}.block_count is {blocks}; fetch or write the file again")
    wanted = gguf_names(header.architecture, blocks, shapes)
    missing = [name for name in shapes if not set(wanted.get(name, [""])) <= set(header.tensors)]
    if missing:
        raise ModelError(
            f"{file} lacks {len(missing)} tensors of the model: {_shown(missing)}; fetch or write it again"
        )
    ignored = {ROPE_FACTORS} if header.architecture == "llama" else set()
    left = set(header.tensors).difference(*wanted.values(), ignored)
    if left:
        raise ModelError(
            f"{file} has {len(left)} tensors that transformers' {rules.model_type} has no place for: "
            f"{_shown(sorted(left))}; load the original model instead"
        )
    placed = dict[str, Placed]()
    for name, shape in shapes.items():
        entries = tuple(header.tensors[short] for short in wanted[name])
        placed[name] = _checked(header, rules, put(rules, name, tuple(shape), entries))
    return placed


def put(rules: Rules, name: str, shape: tuple[int, ...], entries: tuple[Entry, ...]) -> Placed:
    """What becomes of a tensor of the model on its way from and to `entries`; heads are not known here."""
    stack = _STACK.match(name)
    return Placed(
        entries, shape, offset=rules.norm_offset if entries[0].name.endswith("norm.weight") else 0.0,
        is_stack=stack is not None and not stack["bias"], alternates=stack is not None and rules.alternates,
    )  # fmt: skip


def _checked(header: Header, rules: Rules, placed: Placed) -> Placed:
    """With the heads. Raises ModelError for entries of other shapes than the model's, or of several types."""
    file, first, expected = header.path.name, placed.entry, placed.shape_in_file
    for entry in placed.entries:
        if entry.shape != expected:
            raise ModelError(f"{file}: {entry.name} has the shape {entry.shape}, its metadata say {expected}")
        if entry.type != first.type:
            raise ModelError(
                f"{file}: {first.name} is {first.type.name} and {entry.name} {entry.type.name}; they are multiplied as "
                "one here, and have one type: quantize it again, or give it to another runtime (--backend llama-cpp)"
            )
    if first.type.packed and not placed.holds_blocks:
        raise ModelError(f"{file}: {first.name} is {first.type.name}, and numbers are expected; write it again")
    if not rules.permutes or not is_permuted(first.name):
        return placed
    heads = header.number("attention.head_count")
    if ".attn_k." in first.name:
        heads = header.number("attention.head_count_kv") or heads
    if not heads or first.shape[0] % (2 * heads):
        raise ModelError(
            f"{file}: {first.name} has {first.shape[0]} rows, which are not {heads} heads; its metadata are damaged"
        )
    return placed._replace(heads=heads)


def is_permuted(name: str) -> bool:
    """Whether llama.cpp's converter permutes the rows of a tensor of that name, where it permutes any."""
    return ".attn_q." in name or ".attn_k." in name


def _shown(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
