"""The results as Markdown: what was run, on what, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def markdown(results: Row) -> str:
    """The whole page, of what is known so far."""
    rows = results["steps"]
    parts = [
        f"# On {results.get('device', {}).get('name') or results['asked']['device']}",
        conditions(results),
        *results.get("notes", []),
        section("Backends", ("backend", "runs", "checks passed", "failed", "not applicable", "s", "what was found"),
                [backend_row(diagnosis, rows) for diagnosis in results.get("diagnoses", [])]),
        section("Models and candidates",
                ("what", "load s", "stored MiB", "planned", "load peak MiB", "planned", "run peak MiB",
                 "planned", "pp", "tg", "direct tg", "ratio",
                 "KL", "top-1", "kernel", "what was found"),
                [candidate_row(row, rows) for row in rows if row["kind"] in ("dense", "candidate")]),
        section("Training",
                ("what", "steps/s", "peak MiB", "weights and adapters, planned MiB", "loss", "what was found"),
                [training_row(row) for row in rows if row["kind"] == "training"]),
        section("Placement", ("what", "budget MiB", "MiB on", "load peak MiB", "KL", "tg", "what was found"),
                [placing_row(row) for row in rows if row["kind"] == "placing"]),
        section("Steps that did not end well", ("step", "status", "s", "reason"),
                [(row["step"], row["status"], f"{row['seconds']:.1f}", row["reason"])
                 for row in rows if row["status"] != "done"]),
        f"{len(rows)} steps, {sum(row['status'] == 'done' for row in rows)} done, {results['seconds']:.0f} s.",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def conditions(results: Row) -> str:
    """Device, driver, versions, date, in a sentence."""
    device, machine = results.get("device", {}), results.get("machine", {})
    versions = results.get("versions", {})
    named = [
        f"{name} {versions[name]}" for name in ("polyquant", "torch", "transformers", "triton") if name in versions
    ]
    parts = [device.get("name", ""), f"driver {device['driver']}" if device.get("driver") else "",
             f"CUDA {device['cuda']}" if device.get("cuda") else "",
             f"{machine['cores']} cores" if machine else "", f"Python {machine['python']}" if machine else "",
             *named, results["date"]]  # fmt: skip
    small = " Small sizes: a rehearsal, its speeds mean nothing." if results["asked"]["small"] else ""
    return f"{', '.join(part for part in parts if part)}.{small}"


def section(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A heading with its table; empty where there is no row."""
    lines = [f"| {' | '.join(in_cell(text) for text in row)} |" for row in rows]
    if not lines:
        return ""
    head = [f"| {' | '.join(headings)} |", f"|{' --- |' * len(headings)}"]
    return "\n".join([f"## {title}\n", *head, *lines])


def in_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "-"


def backend_row(diagnosis: Row, rows: list[Row]) -> tuple[str, ...]:
    found = next((row for row in rows if row["step"] == f"conformance:{diagnosis['backend']}"), None)
    problems = "; ".join(problem["what"] for problem in diagnosis["problems"])
    if problems or found is None:
        why = "not reached" if diagnosis["on_gpus"] else "not checked: it declares no GPU"
        return (diagnosis["backend"], "no" if problems else "yes", "", "", "", "", problems or why)
    counts, failures = found["facts"].get("counts", {}), found["facts"].get("failures", [])
    said = [found["reason"]] if found["reason"] else []
    if failures:
        worst = failures[0]
        said.append(f"{len(failures)} failed, first {worst['check']} {worst['case']}: {worst['reason']}")
    return (
        diagnosis["backend"], "yes", str(counts.get("passed", 0)), str(counts.get("failed", 0)),
        str(counts.get("not applicable", 0)), f"{found['seconds']:.0f}", "; ".join(said)[:300],
    )  # fmt: skip


def candidate_row(row: Row, rows: list[Row]) -> tuple[str, ...]:
    facts = row["facts"]
    direct = next((other for other in rows if other["step"] == f"{row['step']} direct"), {"facts": {}, "reason": ""})
    theirs = direct["facts"].get("tg")
    ratio = f"{facts['tg'] / theirs:.2f}" if theirs and facts.get("tg") else ""
    alone = f"direct: {direct['reason']}" if direct["reason"] not in ("", row["reason"]) else ""
    said = [row["reason"], *facts.get("failed_checks", []), alone]
    return (
        row["step"], number(facts.get("load_seconds")),
        mib(facts.get("stored_bytes")), against(facts, "stored_bytes", "planned_bytes"),
        mib(facts.get("load_peak_bytes")), against(facts, "load_peak_bytes", "load_peak_planned_bytes"),
        mib(facts.get("run_peak_bytes")), against(facts, "run_peak_bytes", "run_peak_planned_bytes"),
        number(facts.get("pp")), number(facts.get("tg")), number(theirs), ratio,
        f"{facts['kl']:.4f}" if "kl" in facts else "", f"{facts['top1']:.3f}" if "top1" in facts else "",
        facts.get("kernel", ""), "; ".join(part for part in said if part)[:300],
    )  # fmt: skip


def training_row(row: Row) -> tuple[str, ...]:
    facts = row["facts"]
    loss = f"{facts['first_loss']:.2f} to {facts['last_loss']:.2f}" if "last_loss" in facts else ""
    return (row["step"], number(facts.get("steps_per_second")), mib(facts.get("peak_bytes")),
            mib(facts.get("peak_planned_bytes")), loss, row["reason"][:300])  # fmt: skip


def placing_row(row: Row) -> tuple[str, ...]:
    facts = row["facts"]
    where = ", ".join(f"{device} {mib(nbytes)}" for device, nbytes in facts.get("bytes_on", {}).items())
    refused = f"refused where nothing may spill: {facts['refused']}" if facts.get("refused") else ""
    said = [row["reason"], *facts.get("failed_checks", []), refused]
    return (row["step"], mib(facts.get("budget_bytes")), where, mib(facts.get("load_peak_bytes")),
            f"{facts['kl']:.4f}" if "kl" in facts else "", number(facts.get("tg")),
            "; ".join(part for part in said if part)[:300])  # fmt: skip


def against(facts: Row, measured: str, planned: str) -> str:
    """How far a measured figure is from the planned one."""
    if not facts.get(measured) or not facts.get(planned):
        return ""
    return f"{facts[measured] / facts[planned] - 1:+.1%}"


def mib(nbytes: float | None) -> str:
    return "" if nbytes is None else f"{nbytes / 2**20:.0f}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
