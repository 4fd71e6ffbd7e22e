"""Proves what a load gave: bytes, coverage, layers, outputs. Every check says what was expected and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

import msgspec

from polyquant.isolated.remote import RemoteModel
from polyquant.loaded import SAMPLE_PROMPT, LoadedModel, Prompt
from polyquant.loading import checks
from polyquant.loading.records import Check, Memory, Sample, Verification, total
from polyquant.memory.peak import measure_peak
from polyquant.memory.predicted import predict, weights_of
from polyquant.models.prompts import prompt_ids
from polyquant.modules import module_of
from polyquant.types import LayerInfo, LayerPlan


def verify(loaded: LoadedModel, *, prompt: Prompt = SAMPLE_PROMPT, max_new_tokens: int = 16) -> Verification:
    """Run every check on `loaded`: one forward pass and one greedy generation, nothing is changed.

    Raises nothing for a model that fails a check: read `passed` and `checks`.
    """
    if isinstance(loaded, RemoteModel):
        return _in_worker(loaded, {"prompt": prompt, "max_new_tokens": max_new_tokens})
    now = loaded.layers
    before = _before_running(loaded, now)
    plans = _plans(loaded)
    walked = _walked(loaded)
    stored, planned = total(before), total(plans) if plans else None
    tokens = prompt_ids(loaded.tokenizer, SAMPLE_PROMPT)
    with measure_peak() as run_peak:
        outputs = _run(loaded, tokens, prompt, max_new_tokens)
    known = {layer.name for layer in before}  # what came since is a state that the model keeps, and no weight
    after = total([layer for layer in loaded.layers if layer.name in known])
    done = [
        checks.coverage(before),
        checks.against_plan(loaded.initial_layers or before, plans),
        checks.described(walked, total(now)),
        checks.reasons(before),
        checks.after_forward(stored, after),
        *outputs.checks,
        checks.effective(loaded),
        checks.placed(loaded, before),
        checks.eval_mode(loaded),
    ]
    peak_plan = _load_peak_planned(loaded, plans)
    load_record = next((record for record in loaded.records if record.hook == "load"), None)
    request = loaded.request
    return Verification(
        model=request.source.name if request else "",
        backend=loaded.backend.name,
        kernel=loaded.kernel,
        compute_dtype=loaded.config.compute_dtype,
        device=request.device if request else "",
        checks=done,
        memory=Memory(
            weights_planned_bytes=planned,
            weights_stored_bytes=stored,
            weights_reported_bytes=_reported(loaded),
            weights_after_forward_bytes=after,
            weights_bfloat16_bytes=sum(
                2 * layer.weights
                for layer in before
                if layer.role not in ("buffer", "adapter") and not checks.is_tied(layer)
            ),
            quantized_bytes=total([layer for layer in before if layer.quantized]),
            quantized_planned_bytes=total([plan for plan in plans if plan.quantized]) if plans else None,
            quantized_reported_bytes=_quantized_reported(loaded, before),
            quantized_weights=sum(layer.weights for layer in before if layer.quantized),
            checkpoint_bytes=request.source.checkpoint_bytes if request else 0,
            load_peak_bytes=load_record.peak_bytes if load_record else None,
            run_peak_bytes=run_peak.peak_bytes,
            kv_cache_bytes_per_token=outputs.kv_cache_bytes_per_token,
            load_peak_planned_bytes=peak_plan,
        ),
        layers=before,
        load_seconds=load_record.seconds if load_record else 0.0,
        sample=outputs.sample,
        emulated_activations=loaded.emulated_activations,
        notes=[*loaded.notes, *outputs.notes, *checks.load_peak_note(load_record, peak_plan)],
    )


def _before_running(loaded: LoadedModel, now: list[LayerInfo]) -> list[LayerInfo]:
    """The layers as they were before any forward pass: loading runs some tokens, in which kernels lay weights out anew.

    As they are `now` where somebody has changed the model since.
    """
    adapters = [layer for layer in now if layer.role == "adapter"]
    if loaded.tried_bytes != total(now) - total(adapters):
        return now
    return [*loaded.initial_layers, *adapters]


def _plans(loaded: LoadedModel) -> list[LayerPlan]:
    """What the backend plans for the settled weights; nothing where it does not plan."""
    if loaded.settled is None or not loaded.backend.can("plan_layers"):
        return []
    return loaded.backend.plan_layers(loaded.settled.weights, loaded.config)


def _load_peak_planned(loaded: LoadedModel, plans: Sequence[LayerPlan]) -> int | None:
    """What was held before the load, and what the load was to add; None where either is not known."""
    record = next((record for record in loaded.records if record.hook == "load"), None)
    if record is None or record.held_bytes is None or loaded.settled is None or not plans:
        return None
    settled = loaded.settled
    weights = weights_of(plans, settled.checkpoint, settled.dtype, loaded.backend.capabilities)
    return record.held_bytes + predict(record.device, 0, weights, 0, 0).load


def _in_worker(loaded: RemoteModel, arguments: dict[str, object]) -> Verification:
    """Every check, run in the worker, where the module is."""
    answer = loaded.model.call("verify", arguments=arguments, notes=loaded.notes)
    report = msgspec.convert(answer, Verification)
    return msgspec.structs.replace(report, model=loaded.request.source.name if loaded.request else report.model)


def _walked(loaded: LoadedModel) -> int | None:
    """Bytes of all storages, found without the backend's help; None where the model is no torch module."""
    if not loaded.backend.capabilities.runs_on_torch:
        return None
    from polyquant.memory.storage import stored_bytes

    return stored_bytes(loaded.model)


def _reported(loaded: LoadedModel) -> int | None:
    footprint = getattr(loaded.model, "get_memory_footprint", None)
    return int(footprint()) if footprint else None


def _quantized_reported(loaded: LoadedModel, layers: Sequence[LayerInfo]) -> int | None:
    """The part of transformers' figure that is quantized: elements times element size of the parameters."""
    if not loaded.backend.capabilities.runs_on_torch:
        return None
    quantized = {f"{module_of(layer)}.{part}" for layer in layers if layer.quantized for part in layer.parts}
    parameters = loaded.model.named_parameters()
    return sum(int(tensor.nbytes) for name, tensor in parameters if name in quantized)


class _Outputs(NamedTuple):
    """What running the model gave."""

    checks: list[Check]
    sample: Sample
    kv_cache_bytes_per_token: int | None
    notes: tuple[str, ...] = ()


def _run(loaded: LoadedModel, tokens: Sequence[int], prompt: Prompt, max_new_tokens: int) -> _Outputs:
    """A forward pass and a greedy generation; an error in either is a failed check, not an end."""
    try:
        logits = loaded.logits(tokens)
        cache = loaded.kv_cache_bytes_per_token(tokens)
        started = perf_counter()
        text = loaded.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)
        seconds = perf_counter() - started
    except Exception as error:  # of the model's own code, and the answer to what is being asked
        found = f"{type(error).__name__}: {error}"
        failed = Check(name="runs", passed=False, expected="a forward pass and a generation", found=found)
        return _Outputs([failed], Sample(text="", seconds=0.0, tokens_per_second=0.0), None)
    generated = len(loaded.tokenizer(text, add_special_tokens=False).input_ids)
    sample = Sample(text=text, seconds=seconds, tokens_per_second=generated / seconds)
    uncounted = cache is None and loaded.backend.capabilities.runs_on_torch
    notes = ("what it keeps between tokens is not counted: its outputs show none of it",) if uncounted else ()
    return _Outputs([checks.finite(logits), checks.sample(text)], sample, cache, notes)
