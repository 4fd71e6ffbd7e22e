"""Proves what a load gave: bytes, coverage, layers, outputs. Every check says what was expected and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from polyquant import loading
from polyquant.errors import PolyquantError
from polyquant.loaded import LoadedModel, Prompt
from polyquant.memory.peak import measure_peak
from polyquant.report import DENSE_ROLES, Check, Memory, Sample, Verification, total
from polyquant.types import LayerInfo, LayerPlan

COVERAGE_FLOOR = 0.95  # share of the quantizable weights, by their number, that must be quantized
PLAN_TOLERANCE = 0.01  # stored bytes against planned bytes
SAMPLE_PROMPT = "The capital of France is"


def verify(loaded: LoadedModel, *, prompt: Prompt = SAMPLE_PROMPT, max_new_tokens: int = 16) -> Verification:
    """Run every check on `loaded`: one forward pass and one greedy generation, nothing is changed.

    Raises nothing for a model that fails a check: read `passed` and `checks`.
    """
    before = loaded.layers
    plans = _plans(loaded)
    walked = _walked(loaded)
    stored, planned = total(before), total(plans) if plans else None
    tokens = loaded.tokenizer(SAMPLE_PROMPT).input_ids
    with measure_peak() as run_peak:
        logits = loaded.logits(tokens)
        started = perf_counter()
        text = loaded.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)
        seconds = perf_counter() - started
    after = total(loaded.layers)
    generated = len(loaded.tokenizer(text, add_special_tokens=False).input_ids)
    checks = [
        _coverage(before),
        _against_plan(loaded.initial_layers or before, plans),
        _described(walked, stored),
        _reasons(before),
        _after_forward(stored, after),
        _finite(logits),
        _sample(text),
        _effective(loaded),
        _placed(loaded, before),
        _eval_mode(loaded),
    ]
    load_record = next((record for record in loaded.records if record.hook == "load"), None)
    request = loaded.request
    return Verification(
        model=request.source.name if request else "",
        backend=loaded.backend.name,
        kernel=loaded.kernel,
        compute_dtype=loaded.config.compute_dtype,
        device=request.device if request else "",
        checks=checks,
        memory=Memory(
            weights_planned_bytes=planned,
            weights_stored_bytes=stored,
            weights_reported_bytes=_reported(loaded),
            weights_after_forward_bytes=after,
            weights_bfloat16_bytes=sum(
                2 * layer.weights for layer in before if layer.role != "buffer" and not _tied(layer)
            ),
            quantized_bytes=total([layer for layer in before if layer.quantized]),
            quantized_planned_bytes=total([plan for plan in plans if plan.quantized]) if plans else None,
            quantized_reported_bytes=_quantized_reported(loaded, before),
            quantized_weights=sum(layer.weights for layer in before if layer.quantized),
            checkpoint_bytes=request.source.checkpoint_bytes if request else 0,
            load_peak_bytes=load_record.peak_bytes if load_record else None,
            run_peak_bytes=run_peak.peak_bytes,
            kv_cache_bytes_per_token=_kv_cache(loaded, tokens),
        ),
        layers=before,
        load_seconds=load_record.seconds if load_record else 0.0,
        sample=Sample(text=text, seconds=seconds, tokens_per_second=generated / seconds if seconds else 0.0),
        notes=list(loaded.notes),
    )


def _tied(layer: LayerInfo) -> bool:
    return layer.reason.startswith("tied to")


def _plans(loaded: LoadedModel) -> list[LayerPlan]:
    if loaded.request is None or not loaded.backend.can("plan_layers"):
        return []
    return loading.plan(
        loaded.request.source, loaded.backend, loaded.config, trust_remote_code=loaded.request.trust_remote_code
    )


def _coverage(layers: Sequence[LayerInfo]) -> Check:
    asked_dense = [layer for layer in layers if layer.reason == "skipped on request"]
    quantizable = [
        layer for layer in layers if layer.role not in DENSE_ROLES and not _tied(layer) and layer not in asked_dense
    ]
    total_weights = sum(layer.weights for layer in quantizable)
    share = sum(layer.weights for layer in quantizable if layer.quantized) / total_weights if total_weights else 0.0
    largest = sorted((layer for layer in quantizable if not layer.quantized), key=lambda layer: -layer.weights)[:3]
    dense = "".join(
        f"; dense: {layer.name} ({layer.stored_bytes / 2**20:.1f} MiB, {layer.reason})" for layer in largest
    )
    return Check(
        name="coverage",
        passed=share >= COVERAGE_FLOOR,
        expected=f"at least {COVERAGE_FLOOR:.0%} of the weights in the blocks quantized",
        found=f"{share:.1%}{dense}",
    )


def _against_plan(layers: Sequence[LayerInfo], plans: Sequence[LayerPlan]) -> Check:
    if not plans:
        return Check(
            name="planned bytes", passed=True, expected="a plan", found="the backend does not plan; not checked"
        )
    stored = {layer.name: layer.stored_bytes for layer in layers}
    quantized = {layer.name for layer in layers if layer.quantized}
    difference = abs(total(layers) - total(plans)) / total(plans)
    named = ""
    if difference > PLAN_TOLERANCE:
        gaps = sorted(plans, key=lambda plan: -abs(plan.stored_bytes - stored.get(plan.name, 0)))
        rows = (f"{plan.name} planned {plan.stored_bytes}, stored {stored.get(plan.name, 0)}" for plan in gaps[:3])
        named = "; largest differences: " + "; ".join(rows)
    astray = [plan.name for plan in plans if plan.quantized != (plan.name in quantized)]
    wrong = f"; planned otherwise: {', '.join(astray[:3])}" if astray else ""
    return Check(
        name="planned bytes",
        passed=difference <= PLAN_TOLERANCE and not astray,
        expected=f"{total(plans)} bytes, at most {PLAN_TOLERANCE:.0%} off, every tensor as planned",
        found=f"{total(layers)} bytes, {difference:.2%} off{named}{wrong}",
    )


def _walked(loaded: LoadedModel) -> int | None:
    """Bytes of all storages, found without the backend's help; None where the model is no torch module."""
    if not loaded.backend.capabilities.torch_module:
        return None
    from polyquant.memory.storage import stored_bytes

    return stored_bytes(loaded.model)


def _described(walked: int | None, stored: int) -> Check:
    expected = (
        "no torch module: the runtime's own count" if walked is None else f"{walked} bytes found by the storage walk"
    )
    return Check(
        name="described bytes", passed=walked in (None, stored), expected=expected, found=f"{stored} bytes described"
    )


def _reasons(layers: Sequence[LayerInfo]) -> Check:
    silent = [layer.name for layer in layers if not layer.quantized and not layer.reason]
    found = f"no reason: {', '.join(silent[:3])}" if silent else "all have one"
    return Check(name="dense tensors", passed=not silent, expected="every dense tensor has its reason", found=found)


def _after_forward(stored: int, after: int) -> Check:
    return Check(
        name="bytes after a forward pass",
        passed=after <= stored * (1 + PLAN_TOLERANCE),
        expected=f"still {stored} bytes, at most {PLAN_TOLERANCE:.0%} more",
        found=f"{after} bytes"
        + ("" if after <= stored * (1 + PLAN_TOLERANCE) else ": weights are decompressed on first use"),
    )


def _finite(logits: Any) -> Check:
    finite = bool(logits.isfinite().all())
    return Check(
        name="finite logits",
        passed=finite,
        expected="no NaN or infinity",
        found=f"{'all' if finite else 'not all'} of {tuple(logits.shape)} finite",
    )


def _sample(text: str) -> Check:
    return Check(name="sample", passed=bool(text.strip()), expected="some text", found=repr(text[:60]))


def _effective(loaded: LoadedModel) -> Check:
    """The library's own config of the loaded model, read back, against the options."""
    name, expected = "effective config", f"{loaded.config!r}"
    native = getattr(getattr(loaded.model, "config", None), "quantization_config", None)
    if native is None:
        return Check(name=name, passed=True, expected=expected, found="the model carries no config of its own")
    stored = native if isinstance(native, dict) else native.to_dict()
    try:
        effective = type(loaded.config).from_stored(stored)
    except (PolyquantError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        return Check(name=name, passed=False, expected=expected, found=f"cannot be read back: {error}")
    asked = loaded.config
    changed = [
        f"{field}: asked {getattr(asked, field)!r}, is {getattr(effective, field)!r}"
        for field in asked.__struct_fields__
        if field not in asked.load_time and getattr(asked, field) != getattr(effective, field)
    ]
    return Check(name=name, passed=not changed, expected=expected, found="; ".join(changed) or "the same")


def _placed(loaded: LoadedModel, layers: Sequence[LayerInfo]) -> Check:
    wanted = sorted({str(device) for device in loaded.request.device_map.values()}) if loaded.request else []
    found = sorted({layer.device for layer in layers})
    offloads = loaded.request is not None and loaded.request.offload == "cpu"
    kinds = {device.partition(":")[0] for device in found} - {"cpu" if offloads else ""}
    meta = [layer.name for layer in layers if layer.device == "meta"]
    asked = loaded.request.device.partition(":")[0] if loaded.request else "cpu"
    return Check(
        name="placement",
        passed=kinds <= {asked} and not meta,
        expected=f"on {', '.join(wanted)}",
        found=f"on {', '.join(found)}",
    )


def _eval_mode(loaded: LoadedModel) -> Check:
    training = bool(getattr(loaded.model, "training", False))
    return Check(
        name="eval mode", passed=not training, expected="eval mode", found="training mode" if training else "eval mode"
    )


def _reported(loaded: LoadedModel) -> int | None:
    footprint = getattr(loaded.model, "get_memory_footprint", None)
    return int(footprint()) if footprint else None


def _quantized_reported(loaded: LoadedModel, layers: Sequence[LayerInfo]) -> int | None:
    """The part of transformers' figure that is quantized: elements times element size of the parameters."""
    if not loaded.backend.capabilities.torch_module:
        return None
    quantized = {layer.name for layer in layers if layer.quantized}
    parameters = loaded.model.named_parameters()
    return sum(int(tensor.nbytes) for name, tensor in parameters if name in quantized)


def _kv_cache(loaded: LoadedModel, tokens: Sequence[int]) -> int | None:
    """Measured bytes of the key-value cache for each token of context."""
    if not loaded.backend.capabilities.torch_module:
        return None
    import torch

    from polyquant.memory.storage import tensor_bytes

    with torch.inference_mode():
        ids = torch.tensor([list(tokens)], device=loaded.model.device)
        cache = loaded.model(input_ids=ids, use_cache=True).past_key_values
    return round(tensor_bytes(cache) / len(tokens)) if cache is not None else None
