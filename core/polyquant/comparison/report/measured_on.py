"""What a comparison was measured on, in words. Imports nothing heavy."""

from __future__ import annotations

from polyquant.comparison.records import Run
from polyquant.support.machine import Machine
from polyquant.support.sizes import size
from polyquant.types import Record


class Measurers(Record, frozen=True):
    """Machines of one kind that measured rows of a comparison."""

    facts: tuple[tuple[str, str], ...]  # (what, text)
    candidates: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]  # (library, its versions there)


def one_line(run: Run) -> str:
    """Model, quality, device and machine, version and day."""
    parts = (
        run.setting.model,
        quality(run),
        f"device {run.setting.device}: {short_machine(run.machine)}",
        f"polyquant {run.version}, {run.created[:10]}",
    )
    return "; ".join(part for part in parts if part)


def quality(run: Run) -> str:
    """What the quality figures were measured on; empty where there are none."""
    setting = run.setting
    scored = {row.result.quality.tokens_scored for row in run.done if row.result and row.result.quality}
    if not scored:
        return ""
    tokens = f"{min(scored)} tokens" if len(scored) == 1 else f"{min(scored)} to {max(scored)} tokens"
    cut = f"{setting.windows} window{'s'[: setting.windows != 1]}, " if setting.windows else ""
    return f"KL against {setting.reference} on {setting.text} ({setting.preset}, {cut}{tokens} scored)"


def other_work(run: Run) -> str:
    """Which speeds were measured beside other work, and what to do; empty where none were, or it is not known."""
    beside = [
        f"{row.candidate.name} ({row.result.other_work_share:.0%})"
        for row in run.rows
        if row.result is not None and row.result.beside_other_work
    ]
    if not beside:
        return ""
    return (
        f"speed was measured beside other work, which took this much of the cores: {', '.join(beside)}; for speeds of "
        "this machine end the other work and compare in a new folder (--out)"
    )


def short_machine(machine: Machine) -> str:
    """Processor, cores, memory."""
    return f"{machine.processor}, {machine.cores} core{'s'[: machine.cores != 1]}, {size(machine.memory_bytes)}"


def machines_of(run: Run) -> list[Machine]:
    """The machine of each row that was measured; the comparison's own where none was."""
    measured = [row.result.machine for row in run.rows if row.result is not None and row.result.machine is not None]
    return measured or [run.machine]


def versions_of(machines: list[Machine]) -> dict[str, str]:
    """Library -> the versions of it that the machines had."""
    versions: dict[str, set[str]] = {}
    for machine in machines:
        for library, version in machine.versions.items():
            versions.setdefault(library, set()).add(version)
    return {library: ", ".join(sorted(known)) for library, known in sorted(versions.items())}


def measurers(run: Run) -> list[Measurers]:
    """The machines that measured it; one where all rows are of machines that are alike."""
    alike: dict[tuple[tuple[str, str], ...], list[tuple[str, Machine]]] = {}
    for row in run.rows:
        if row.result is not None and row.result.machine is not None:
            alike.setdefault(_facts(row.result.machine), []).append((row.candidate.name, row.result.machine))
    if not alike:
        alike[_facts(run.machine)] = [("", run.machine)]
    return [
        Measurers(
            facts=facts,
            candidates=tuple(name for name, _ in rows),
            versions=tuple(versions_of([machine for _, machine in rows]).items()),
        )
        for facts, rows in alike.items()
    ]


def _facts(machine: Machine) -> tuple[tuple[str, str], ...]:
    facts = (
        ("processor", machine.processor),
        ("cores", str(machine.cores)),
        ("memory", size(machine.memory_bytes)),
        ("accelerators", ", ".join(machine.accelerators)),
        ("system", machine.system),
        ("Python", machine.python),
    )
    return tuple((name, text) for name, text in facts if text)
