"""The checks of a verification: pure functions from what was measured to a `Check`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyquant.errors import PolyquantError
from polyquant.loaded import LoadedModel
from polyquant.loading.records import DENSE_ROLES, Check, total
from polyquant.support.sizes import size
from polyquant.types import HookRecord, LayerInfo, LayerPlan

COVERAGE_FLOOR = 0.95  # share of the quantizable weights, by their number, that must be quantized
PLAN_TOLERANCE = 0.01  # stored bytes against planned bytes
PEAK_TOLERANCE = 0.25  # a load's peak against its plan, beyond which a note says so


def is_tied(layer: LayerInfo) -> bool:
    """Whether the tensor shares another's storage."""
    return layer.reason.startswith("tied to")


def coverage(layers: Sequence[LayerInfo]) -> Check:
    asked_dense = [layer for layer in layers if layer.reason == "skipped on request"]
    quantizable = [
        layer for layer in layers if layer.role not in DENSE_ROLES and not is_tied(layer) and layer not in asked_dense
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


def against_plan(layers: Sequence[LayerInfo], plans: Sequence[LayerPlan]) -> Check:
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


def load_peak_note(record: HookRecord | None, planned: int | None) -> list[str]:
    """What a load took, where it is far from its plan. No check: a process's resident set depends on its allocator."""
    if record is None or record.peak_bytes is None or not planned:
        return []
    apart = record.peak_bytes / planned - 1
    if abs(apart) <= PEAK_TOLERANCE:
        return []
    return [
        f"the load's peak was {size(record.peak_bytes)}, {abs(apart):.0%} {'more' if apart > 0 else 'less'} than "
        f"planned ({size(planned)}): freed memory that was kept, libraries imported meanwhile, or pages not read"
    ]


def described(walked: int | None, stored: int) -> Check:
    expected = (
        "no torch module: the runtime's own count" if walked is None else f"{walked} bytes found by the storage walk"
    )
    return Check(
        name="described bytes", passed=walked in (None, stored), expected=expected, found=f"{stored} bytes described"
    )


def reasons(layers: Sequence[LayerInfo]) -> Check:
    silent = [layer.name for layer in layers if not layer.quantized and not layer.reason]
    found = f"no reason: {', '.join(silent[:3])}" if silent else "all have one"
    return Check(name="dense tensors", passed=not silent, expected="every dense tensor has its reason", found=found)


def after_forward(stored: int, after: int) -> Check:
    return Check(
        name="bytes after a forward pass",
        passed=after <= stored * (1 + PLAN_TOLERANCE),
        expected=f"still {stored} bytes, at most {PLAN_TOLERANCE:.0%} more",
        found=f"{after} bytes"
        + ("" if after <= stored * (1 + PLAN_TOLERANCE) else ": weights are decompressed on first use"),
    )


def finite(logits: Any) -> Check:
    finite = bool(logits.isfinite().all())
    return Check(
        name="finite logits",
        passed=finite,
        expected="no NaN or infinity",
        found=f"{'all' if finite else 'not all'} of {tuple(logits.shape)} finite",
    )


def sample(text: str) -> Check:
    return Check(name="sample", passed=bool(text.strip()), expected="some text", found=repr(text[:60]))


def effective(loaded: LoadedModel) -> Check:
    """The library's own config of the loaded model, read back, against the options.

    Which modules of a stored checkpoint are dense, its headers say; a config may name them in other words.
    """
    name, expected = "effective config", f"{loaded.config!r}"
    native = getattr(getattr(loaded.model, "config", None), "quantization_config", None)
    if native is None:
        return Check(name=name, passed=True, expected=expected, found="the model carries no config of its own")
    stored = native if isinstance(native, dict) else native.to_dict()
    try:
        effective = type(loaded.config).from_stored(stored)
    except (PolyquantError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        return Check(name=name, passed=False, expected=expected, found=f"cannot be read back: {error}")
    asked, free = loaded.config, set(loaded.config.load_time)
    if loaded.settled is not None and loaded.settled.route == "as stored":
        free |= {"skip", "skip_defaults"}
    changed = [
        f"{field}: asked {getattr(asked, field)!r}, is {getattr(effective, field)!r}"
        for field in asked.__struct_fields__
        if field not in free and getattr(asked, field) != getattr(effective, field)
    ]
    return Check(name=name, passed=not changed, expected=expected, found="; ".join(changed) or "the same")


def placed(loaded: LoadedModel, layers: Sequence[LayerInfo]) -> Check:
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


def eval_mode(loaded: LoadedModel) -> Check:
    training = bool(getattr(loaded.model, "training", False))
    return Check(
        name="eval mode", passed=not training, expected="eval mode", found="training mode" if training else "eval mode"
    )
