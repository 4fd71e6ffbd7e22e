"""The page of methods: who reads, writes and trains each, and how far its numbers are from those of others' code."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from generate_backends import markdown
from polyquant.cli.show_backends import quantizes
from polyquant.testing.oracles import Agreement
from polyquant.types import BackendInfo

TRANSFORMERS = (
    "awq", "bitsandbytes_4bit", "bitsandbytes_8bit", "gptq", "aqlm", "quanto", "quark", "fouroversix", "fp_quant",
    "eetq", "higgs", "hqq", "compressed-tensors", "fbgemm_fp8", "torchao", "bitnet", "vptq", "spqr", "fp8", "gguf",
    "nvfp4", "mxfp8", "auto-round", "mxfp4", "metal", "sinq", "gemma",
)  # fmt: skip
"""The methods that transformers 5.23 names; a test holds them against it."""
CALLED = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}
"""Methods whose files have another quant_method -> that."""
HEADINGS = ("method", "backend", "reads", "writes", "trains", "oracle", "largest difference")


Seen = Mapping[str, Mapping[str, Agreement]]


def oracles_page(cards: Sequence[BackendInfo], seen: Seen, apart: Collection[str]) -> str:
    """The table: each method of transformers, then the backends that none of these rows has.

    apart: those whose tests run in an environment of their own, where a record may be lacking.
    """
    rows = [(f"`{method}`", *cells(backend_of(method, cards), seen, apart)) for method in TRANSFORMERS]
    named = {backend_of(method, cards).name for method in TRANSFORMERS}
    rows += [("-", *cells(card, seen, apart)) for card in cards if card.name not in named]
    return "\n\n".join([
        "# Methods: who reads, writes and trains them, and what they are held against",
        "Each method that transformers 5.23 names, then the other backends. Written by `python docs/generate.py` from "
        "the backends' cards and from `oracles.json`, which the tests of the plugins write where the environment "
        "variable `POLYQUANT_ORACLES` names it.",
        markdown(HEADINGS, rows),
        "oracle: code of others that computes the same, here on the CPU; by definition: a second program in the tests, "
        "written from the format's description, where nobody's code runs without a GPU. largest difference: of any "
        "number, over the largest number of the oracle's; 0: bit for bit. writes: checkpoints that load back bit for "
        "bit. trains: adapters on the frozen base. Backends in environments of their own are compared there.",
    ]) + "\n"  # fmt: skip


def backend_of(method: str, cards: Sequence[BackendInfo]) -> BackendInfo:
    """The backend that reads what transformers calls so: the one called like it before others."""
    stored = CALLED.get(method, method)
    readers = [card for card in cards if stored in (card.name, *card.capabilities.loads_prequantized)]
    same = stored.replace("-", "_")
    return min(readers, key=lambda card: (card.name.replace("-", "_") != same, card.isolated is not None))


def cells(card: BackendInfo, seen: Seen, apart: Collection[str]) -> tuple[str, ...]:
    """Of one backend: all but the method."""
    can, found = card.capabilities, seen.get(card.name, {})
    return (
        f"[{card.name}](../backends/{card.name}.md)",
        ", ".join(f"`{method}`" for method in can.loads_prequantized),
        "yes" if can.saves else "no" if quantizes(card) in ("no", "loading") else "by `polyquant quantize`",
        "yes" if can.trains else "no",
        "; ".join(found)
        or ("not recorded yet: its tests run in an environment of their own" if card.name in apart else ""),
        "; ".join(f"{one.difference:.2g}" for one in found.values()),
    )
