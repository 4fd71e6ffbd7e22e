"""What the packed layout changes of a backend's plans: the bytes of its weights, and embedding and head in few bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from polyquant.errors import ConfigError
from polyquant.memory.experts import one_expert
from polyquant.options import BackendOptions
from polyquant.packable import is_packed
from polyquant.types import LayerPlan, PackedFormat, WeightInfo

OPTIONS = {"embeddings": "embedding", "head": "head"}
"""Option -> the role of the weight that it is for."""
HALVES = ("bfloat16", "float16")
VOCABULARY: dict[str, PackedFormat] = {
    "8bit": PackedFormat(kind="int8", group_size=32),
    "4bit": PackedFormat(kind="affine4", group_size=32, offsets="zeros"),
}
"""The layouts of embeddings and heads: 8.5 and 4.75 bits a weight."""


def scheme_of(layout: PackedFormat) -> str:
    """What an embedding's or a head's weights are called: int8-g32, int4-g32."""
    return f"int{8 if layout.kind == 'int8' else 4}-g{layout.group_size}"


VOCABULARY_SCHEMES = tuple(scheme_of(layout) for layout in VOCABULARY.values())


def packed_plans(plans: Sequence[LayerPlan], weights: Sequence[WeightInfo], config: BackendOptions) -> list[LayerPlan]:
    """A backend's plans for `weights` as the packed layout has them, where the options ask for it.

    Raises ConfigError for an embedding or head that is not there to be packed.
    """
    planned = list(plans)
    if is_packed(config):
        planned = [
            plan if plan.packed is None else replace(plan, stored_bytes=_packed_bytes(plan.packed, weight))
            for plan, weight in zip(planned, weights, strict=True)
        ]
    asked = {option: getattr(config, option, "") for option in OPTIONS}
    for option, bits in asked.items():
        if bits in VOCABULARY and not is_asked_before(option, asked, weights):
            place = place_of(option, planned, weights)
            planned[place] = in_vocabulary(planned[place], bits)
    return planned


def _packed_bytes(layout: PackedFormat, weight: WeightInfo) -> int:
    """Of a matrix, or of all experts that are stacked in a tensor."""
    if weight.role == "experts":
        return weight.shape[0] * layout.nbytes(one_expert(weight).shape)
    return layout.nbytes(weight.as_linear)


def in_vocabulary(plan: LayerPlan, bits: str) -> LayerPlan:
    """The plan of an embedding or a head in so many bits: '8bit' or '4bit'."""
    layout = VOCABULARY[bits]
    return replace(
        plan, stored_bytes=layout.nbytes(plan.shape), bits=float(bits.removesuffix("bit")), scheme=scheme_of(layout),
        quantized=True, reason="", packed=layout,
    )  # fmt: skip


def is_halved(weight: WeightInfo, config: BackendOptions) -> bool:
    """Whether an embedding or a head is kept in 16 bits beside activations in float32."""
    return weight.role in OPTIONS.values() and weight.dtype in HALVES and config.compute_dtype == "float32"


def is_asked_before(option: str, asked: Mapping[str, str], weights: Sequence[WeightInfo]) -> bool:
    """Whether `head` asks of a tied head what `embeddings` asks of both. asked: option -> what it says."""
    return option == "head" and asked.get("embeddings") == asked["head"] and _is_tied(weights)


def _is_tied(weights: Sequence[WeightInfo]) -> bool:
    """Whether the output head is the embedding's weight: `head` may then say no other than `embeddings`."""
    heads = [weight for weight in weights if weight.role == "head" and len(weight.shape) == 2]
    return bool(heads and heads[0].tied_to)


def place_of(option: str, plans: Sequence[LayerPlan], weights: Sequence[WeightInfo]) -> int:
    """Where the embedding, or the head, is in the plans. Raises ConfigError where it is tied, quantized or absent."""
    role = OPTIONS[option]
    own = [place for place, weight in enumerate(weights) if weight.role == role and len(weight.shape) == 2]
    if role == "head" and _is_tied(weights):
        raise ConfigError(
            f"{weights[own[0]].name} is tied to {weights[own[0]].tied_to}: embeddings= is for both, leave head out "
            "or give it the same"
        )
    if not own:
        raise ConfigError(f"this model has no matrix that is its {role}: leave {option} out")
    words = {weight.shape[0] for weight in weights if weight.role == "head"}  # and not positions, or kinds of tokens
    place = max(own, key=lambda each: (weights[each].shape[0] in words, weights[each].shape[0]))
    if plans[place].quantized:
        raise ConfigError(f"{plans[place].name} is {plans[place].scheme} already: leave {option} out")
    return place
