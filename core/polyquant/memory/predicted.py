"""Peaks of loading and running, predicted from what backends do while they load; docs/explanation/memory.md."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import psutil

from polyquant.options import Dtype
from polyquant.types import DTYPE_BYTES, Capabilities, LayerPlan, Record

TOKENIZER_BYTES = 20_000_000  # what a load adds beside weights: tokenizer and modules, measured on SmolLM2
RUN_BYTES = 60_000_000  # kernels and workspaces that torch takes when it first computes; 30 to 190 MB were measured
WORKING = 6.5  # bytes of each weight of the largest layer, dense and as it is rounded; 3 to 12 were measured


class Weights(NamedTuple):
    """Bytes of a model's weights, as far as peaks depend on them."""

    planned: int  # all of them, after loading
    file: int  # what a load has read before the model is put together; in turn nothing
    largest_dense: int  # the largest tensor that is quantized, in the compute dtype
    working: int = 0  # what one layer takes while it is quantized, beside all that is there already
    own_runtime: bool = False  # not torch's: it maps the file, and makes room for the context while it loads


class Peaks(NamedTuple):
    """Bytes."""

    load: int
    run: int
    reclaimable: int  # part of `load`: pages of a file that may be mapped, which the system can take back
    needed: int  # the larger of the two, without such pages


class Checkpoint(Record, frozen=True):
    """The files that a load reads."""

    nbytes: int
    dtype: str  # of its dense tensors, torch's name
    quantized: bool
    in_turn: bool = False  # a dense one that is quantized tensor by tensor as it is read, and not loaded whole before


def weights_of(
    plans: Sequence[LayerPlan], checkpoint: Checkpoint, compute_dtype: Dtype, capabilities: Capabilities
) -> Weights:
    """What the peaks of a load are made of.

    Of a quantized checkpoint all tensors are read, and then put together. A dense one is quantized tensor by tensor as
    it is read (`polyquant.plugin.stream`); where that cannot be, it is mapped, and what it becomes is made beside it.
    A dense checkpoint of a backend that does not quantize while loading stands for the quantized one that it makes
    first.
    """
    planned = sum(plan.stored_bytes for plan in plans)
    quantized = sum(plan.stored_bytes for plan in plans if plan.quantized)
    dense, file = planned - quantized, checkpoint.nbytes
    stored = DTYPE_BYTES.get(checkpoint.dtype, 2)
    if not checkpoint.quantized and capabilities.on_the_fly:
        file = 0 if checkpoint.in_turn else file + planned
    elif not checkpoint.quantized:
        file = quantized + dense * stored // DTYPE_BYTES[compute_dtype]

    def largest(*without: str) -> int:
        taken = (plan for plan in plans if plan.quantized and plan.role not in without)
        return max((prod(plan.shape[-2:]) for plan in taken), default=0)

    stacks = max((prod(plan.shape) for plan in plans if plan.quantized and len(plan.shape) > 2), default=0)
    # embedding and head come before the blocks, while there is room
    working = int(WORKING * largest("embedding", "head")) + 2 * stored * stacks
    return Weights(
        planned=planned,
        file=file,
        working=working if checkpoint.in_turn else 0,
        own_runtime=not capabilities.runs_on_torch,
        largest_dense=largest("embedding") * DTYPE_BYTES[compute_dtype] if capabilities.runs_on_torch else 0,
    )


def predict(device: str, process: int, weights: Weights, kv_cache: int, activations: int) -> Peaks:
    """Peaks of one load and one run.

    CPU, as the process's resident set. Of a dense checkpoint that is read in turn there is at a time what has been
    quantized, and what is done to one layer. Of a quantized one there is what the file has or what it becomes, a layer
    both; where memory is short, a load maps it, and what exceeds its tensors can be taken back.
    Elsewhere, as the allocator's peak: the weights, with one dense layer at a time.
    Running adds the cache, the activations, a dense copy of one layer, and what torch takes when it first computes.
    """
    if device.partition(":")[0] != "cpu":
        load = weights.planned + weights.largest_dense
        run = weights.planned + kv_cache + activations + weights.largest_dense
        return Peaks(load, run, 0, max(load, run))
    held = process + TOKENIZER_BYTES
    run = held + weights.planned + RUN_BYTES + kv_cache + activations + weights.largest_dense
    if weights.own_runtime:
        return Peaks(run, run, 0, run)
    load = held + max(weights.file, weights.planned) + weights.working
    reclaimable = max(0, weights.file - weights.planned)
    return Peaks(load, run, reclaimable, max(load - reclaimable, run))


def resident_bytes() -> int:
    """What this process holds now."""
    return int(psutil.Process().memory_info().rss)
