"""Peaks of loading and running, predicted from what backends do while they load; docs/explanation/memory.md."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import psutil

from polyquant.options import Dtype
from polyquant.types import DTYPE_BYTES, Capabilities, LayerPlan, Record

TOKENIZER_BYTES = 13_000_000  # what a load adds beside weights: tokenizer and modules, measured on SmolLM2

RUN_BYTES = 60_000_000  # kernels and workspaces that torch takes when it first computes; 30 to 190 MB were measured


class Weights(NamedTuple):
    """Bytes of a model's weights, as far as peaks depend on them."""

    planned: int  # all of them, after loading
    file: int  # of the checkpoint that a load reads
    copied: int  # what is made anew in memory beside the mapped file
    largest_dense: int  # the largest tensor that is quantized, in the compute dtype
    passing: int = 0  # what dense experts take more than packed ones: all of them are dense once, at most in that dtype
    tensorwise: bool = False  # the file's tensors are read one by one into memory of their own, and nothing is mapped
    own_runtime: bool = False  # not torch's: it maps the file, and makes room for the context while it loads


class Peaks(NamedTuple):
    """Bytes."""

    load: int
    run: int
    reclaimable: int  # part of `load`: mapped pages that nothing needs any more, and that the system can take back
    needed: int  # the larger of the two, without such pages


class Checkpoint(Record, frozen=True):
    """The files that a load reads."""

    nbytes: int
    dtype: str  # of its dense tensors, torch's name
    quantized: bool


def weights_of(
    plans: Sequence[LayerPlan], checkpoint: Checkpoint, compute_dtype: Dtype, capabilities: Capabilities
) -> Weights:
    """What the peaks of a load are made of.

    A quantized checkpoint is read tensor by tensor (`polyquant.plugin.checkpoints`). Of a dense one, which is mapped,
    tensors that are quantized are made anew, and the dense ones whose dtype changes; the others stay in the file's
    pages. A dense checkpoint of a backend that does not quantize while loading stands for the quantized one that it
    makes first.
    """
    planned = sum(plan.stored_bytes for plan in plans)
    quantized = sum(plan.stored_bytes for plan in plans if plan.quantized)
    dense, file = planned - quantized, checkpoint.nbytes
    if not checkpoint.quantized and not capabilities.on_the_fly:
        file = quantized + dense * DTYPE_BYTES.get(checkpoint.dtype, 2) // DTYPE_BYTES[compute_dtype]
    tensorwise = capabilities.runs_on_torch and (checkpoint.quantized or not capabilities.on_the_fly)
    mapped = capabilities.runs_on_torch and not tensorwise
    # of a checkpoint that holds them packed, none is dense at any time
    experts = [
        plan for plan in plans if plan.role == "experts" and plan.packed is not None and not checkpoint.quantized
    ]
    passing = sum(prod(plan.shape) * DTYPE_BYTES[compute_dtype] - plan.stored_bytes for plan in experts)
    largest = max((prod(plan.shape[-2:]) for plan in plans if plan.quantized), default=0)
    return Weights(
        planned=planned,
        file=file,
        tensorwise=tensorwise,
        own_runtime=not capabilities.runs_on_torch,
        copied=quantized + (dense if checkpoint.dtype != compute_dtype else 0) if mapped else 0,
        passing=max(0, passing),
        largest_dense=largest * DTYPE_BYTES[compute_dtype] if capabilities.runs_on_torch else 0,
    )


def predict(device: str, process: int, weights: Weights, kv_cache: int, activations: int) -> Peaks:
    """Peaks of one load and one run.

    CPU, as the process's resident set. A dense checkpoint is mapped, and its pages become resident as they are read;
    beside them lie the tensors that are made anew. Those pages stay while a dense tensor lies in the file; all but its
    own are the system's to take back. Of a quantized one there is at a time what the file has or what it becomes, a
    layer both; where memory is short, a load maps it too, and what exceeds its tensors can be taken back.
    Elsewhere, as the allocator's peak: the weights, with one dense layer at a time.
    Running adds the cache, the activations, a dense copy of one layer, and what torch takes when it first computes.
    """
    if device.partition(":")[0] != "cpu":
        load = weights.planned + weights.largest_dense
        run = weights.planned + kv_cache + activations + weights.largest_dense
        return Peaks(load, run, 0, max(load, run))
    held = process + TOKENIZER_BYTES
    read = max(weights.file, weights.planned) if weights.tensorwise else weights.file + weights.copied
    load = held + read + weights.passing
    reclaimable = max(0, weights.file - (weights.planned - weights.copied))
    run = held + weights.planned + RUN_BYTES + kv_cache + activations + weights.largest_dense
    if weights.own_runtime:
        return Peaks(run, run, 0, run)
    staying = reclaimable if not weights.tensorwise and weights.copied < weights.planned else 0
    return Peaks(load, run + staying, reclaimable, max(load - reclaimable, run))


def resident_bytes() -> int:
    """What this process holds now."""
    return int(psutil.Process().memory_info().rss)
