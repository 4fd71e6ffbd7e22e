"""The tables that are made of the cards: which backend runs on which machine, and who reads what it writes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from generate_backends import markdown
from polyquant.registry.cards import Card
from polyquant.types import BackendInfo

GENERATIONS = {
    (6, 0): "(Pascal: P100, GTX 10)",
    (7, 0): "(Volta: V100)",
    (7, 5): "(Turing: T4, RTX 20)",
    (8, 0): "(Ampere: A100, RTX 30)",
    (8, 9): "(Ada: L4, L40S, RTX 40)",
    (9, 0): "(Hopper: H100, H200)",
    (10, 0): "(Blackwell: B200, RTX 50)",
}
"""Compute capability from which -> NVIDIA's generation, and cards of it."""
OTHERS = {
    "compressed-tensors": "vLLM, SGLang",
    "gptq": "vLLM, SGLang, TGI, transformers",
    "awq": "vLLM, SGLang, TGI, transformers",
    "gguf": "ollama, LM Studio",
    "mlx": "LM Studio",
    "bitsandbytes": "vLLM",
    "fp8": "vLLM, SGLang",
    "quark": "vLLM",
    "torchao": "vLLM",
}
"""A checkpoint's method -> who takes it by their own documentation; polyquant's tests run none of these."""


def machines_table(cards: Sequence[BackendInfo]) -> str:
    """What runs where. NVIDIA's generations that add nothing share the row of the last one that does."""
    groups = ([card for card in cards if card.capabilities.on_the_fly],
              [card for card in cards if not card.capabilities.on_the_fly])  # fmt: skip
    nvidia: list[tuple[str, ...]] = []
    for known, generation in GENERATIONS.items():
        cells, name = [difference(group, known) for group in groups], f"{known[0]}.{known[1]} {generation}"
        if any(cells):
            nvidia.append((f"NVIDIA, compute capability {name}", *cells))
        else:
            nvidia[-1] = (f"{nvidia[-1][0]}; {name}", *nvidia[-1][1:])
    return markdown(
        ("machine", "quantizes a dense model while loading", "reads checkpoints, or makes them offline"),
        [
            ("CPU", *(named(group, "cpu") for group in groups)),
            *nvidia,
            ("Intel GPU (`xpu`)", *(named(group, "xpu") for group in groups)),
            ("Apple GPU (`mps`)", *(named(group, "mps") for group in groups)),
        ],
    )


def named(cards: Iterable[BackendInfo], kind: str) -> str:
    """Links to those of the cards that declare a type of device."""
    return " ".join(link(card) for card in cards if any(device.type == kind for device in card.capabilities.devices))


def difference(cards: Iterable[BackendInfo], generation: tuple[int, int]) -> str:
    """Links to those of the cards that this generation is the first one of the table to run."""
    before = max((known for known in GENERATIONS if known < generation), default=(0, 0))
    return " ".join(
        link(card)
        for card in cards
        for device in card.capabilities.devices
        if device.type == "cuda" and before < (device.minimum_capability or min(GENERATIONS)) <= generation
    )


def link(card: BackendInfo) -> str:
    return f"[{card.name}](../backends/{card.name}.md)"


def formats_table(cards: Sequence[Card]) -> str:
    """Who reads what each backend writes."""
    tried = {"transformers", *(card.info.capabilities.runtime for card in cards)}
    return markdown(
        ("backend", "written by", "checkpoint of", "read by", "taken by, not run here"),
        [formats_row(card, tried) for card in writing(cards)],
    )


def runtimes_table(cards: Sequence[Card]) -> str:
    """What to write for each runtime."""
    takers = {name: ", ".join(link(card.info) for card in writing(cards) if name in OTHERS.get(method_of(card), ""))
              for name in ("vLLM", "SGLang", "TGI", "ollama")}  # fmt: skip
    return markdown(
        ("runtime", "write with", "then"),
        [
            ("transformers", tested(cards, "transformers"), '`AutoModelForCausalLM.from_pretrained("DIR")`'),
            ("llama.cpp", tested(cards, "llama.cpp"), "`llama-cli -m DIR/model.gguf`; here `--backend llama-cpp`"),
            ("mlx-lm", tested(cards, "mlx-lm"), "`mlx_lm.generate --model DIR`"),
            ("vLLM", takers["vLLM"], "`vllm serve DIR`"),
            ("SGLang", takers["SGLang"], "`python -m sglang.launch_server --model-path DIR`"),
            ("TGI", takers["TGI"], "`text-generation-launcher --model-id DIR`"),
            ("ollama", takers["ollama"], "a Modelfile with `FROM DIR/model.gguf`, then `ollama create`"),
        ],
    )


def writing(cards: Sequence[Card]) -> list[Card]:
    """Those that write checkpoints."""
    return [card for card in cards if card.info.capabilities.saves or "quantize" in card.hooks]


def method_of(card: Card) -> str:
    """Of the methods that it reads, its own."""
    return card.info.capabilities.loads_prequantized[0]


def formats_row(card: Card, tried: Collection[str]) -> tuple[str, ...]:
    """tried: the readers that the suite runs."""
    can = card.info.capabilities
    by = " ".join(part for part, there in (("`save`", can.saves), ("`quantize`", "quantize" in card.hooks)) if there)
    method = method_of(card)
    alone = "polyquant" if can.saves else "the library that writes it; polyquant"
    readers = ", ".join(name if name in tried else f"{name} (declared, not run here)" for name in can.readable_by)
    return link(card.info), by, f"`{method}`", readers or alone, OTHERS.get(method, "")


def tested(cards: Iterable[Card], reader: str) -> str:
    return ", ".join(link(card.info) for card in cards if reader in card.info.capabilities.readable_by)
