"""The commands for backend authors: a package to start from, and whether a backend keeps its promises."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from polyquant.cli.arguments import Json, complete_backend
from polyquant.cli.output import print_json, say
from polyquant.errors import BrokenBackend, ConfigError, SaveError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from polyquant.testing.check import Case, ConformanceCheck
    from polyquant.testing.running import Outcome

Status = Literal["passed", "failed", "not applicable", "failed as expected"]
MARKS: Mapping[Status, str] = {
    "passed": "[green]pass[/]", "failed": "[red]FAIL[/]", "not applicable": "[yellow]skip[/]",
    "failed as expected": "[yellow]known[/]",
}  # fmt: skip
WORST: tuple[Status, ...] = (
    "failed",
    "failed as expected",
    "passed",
    "not applicable",
)  # of several runs, the first that there is counts


def new_backend(
    name: Annotated[str, typer.Argument(help="Such as acme; the package is polyquant-acme.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder to write: polyquant-NAME.", show_default=False)] = None,
) -> None:
    """Write a complete backend package to start from. It works as it is; what is yours is marked 'Replace:'.

    Example: polyquant new-backend acme
    """
    from polyquant.authoring import new
    from polyquant.registry.installed import registry

    new.check_name(name, registry().names())
    folder = out or Path(f"polyquant-{name}")
    files = new.new_backend(name, folder)
    say(f"wrote {folder}: {len(files)} files; what is yours is marked 'Replace:'. Next:")
    shown = folder if folder.is_absolute() else f"./{folder.as_posix()}"  # pip would look up a bare name
    say(f"  pip install -e {shlex.quote(str(shown))}\n  polyquant check-backend {name}")


def write_card(
    name: Annotated[str, typer.Argument(help="An installed backend.", autocompletion=complete_backend)],
) -> None:
    """Write card.json beside a plugin's code: what lists backends reads it, and need not import the plugin.

    Of every backend of its package; write it again when the card or its options change.

    Example: polyquant write-card acme
    """
    from polyquant.registry import cards
    from polyquant.registry.installed import registry

    home = cards.home_of(registry().package(name))
    if home is None:
        raise ConfigError(f"{name} is a single file, with no folder for {cards.FILE}; make it a package")
    path = home / cards.FILE
    try:
        path.write_text(cards.text(home, registry().package_cards(name)), encoding="utf-8")
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error}") from error
    say(f"wrote {path}")


def _complete_check(incomplete: str) -> list[str]:
    from polyquant.testing.catalog import ALL

    return [each.name for each in ALL if each.name.startswith(incomplete)]


def check_backend(
    name: Annotated[str, typer.Argument(help="An installed backend.", autocompletion=complete_backend)],
    tests: Annotated[
        Path | None,
        typer.Option(help="The file with its BackendConformance class: floors, known failures.", show_default=False),
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(help="Only this check; may come again.", autocompletion=_complete_check, show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="The device to check on.")] = "auto",
    real: Annotated[bool, typer.Option("--real/--no-real", help="Run the checks on the real model too.")] = True,
    json: Json = False,
) -> None:
    """Put every promise of a backend to the test; exit code 1 where one is broken, with the file, hook and cure.

    Example: polyquant check-backend acme --check loads --check saves_and_loads_back
    """
    from polyquant.authoring.check import checked
    from polyquant.cli import show
    from polyquant.cli.terminal import styled
    from polyquant.support.devices import choose_device
    from polyquant.testing.catalog import ALL
    from polyquant.testing.running import planned, run_checks

    names = [each.name for each in ALL]
    for wrong in set(check or ()) - set(names):
        raise ConfigError(f"there is no check {wrong!r}; there are {', '.join(names)}.{did_you_mean(wrong, names)}")
    without = set(names) - set(check) if check else set()
    with TemporaryDirectory(prefix="polyquant-check-") as folder:
        subject, known = checked(name, Path(folder), device=device, tests=tests)
        try:
            origin = subject.handle.origin
        except BrokenBackend as error:
            if json:
                print_json({"backend": name, "passed": False, "reason": str(error), "outcomes": []})
            else:
                say(f"polyquant: {error}", error=True)
            raise typer.Exit(1) from None
        runs = len(planned(subject, without=without, real=real))
        if not json:
            runs_on = choose_device(subject.device, subject.capabilities)
            told = (name, origin, runs_on, runs, len(names) - len(without))
            show.console.print(styled("[bold]{}[/] ({}) on {}: {} runs of {} checks", *told))
        with _progress(runs) as begin:
            outcomes = _apart(run_checks(subject, without=without, real=real, expected_failures=known, begin=begin))
            done = list(outcomes) if json else list(_reported(outcomes))
    passed = not any(outcome.status == "failed" for outcome in done)
    if json:
        print_json({"backend": name, "origin": origin, "passed": passed, "reason": "", "outcomes": done})
    else:
        _summary(name, done)
    if not passed:
        raise typer.Exit(1)


@contextmanager
def _progress(runs: int) -> Iterator[Callable[[ConformanceCheck, Case], None] | None]:
    """A line on standard error with the run under way, where it is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from polyquant.cli.terminal import Terminal, styled

    with Terminal(stderr=True).status("starting") as status:
        number = iter(range(1, runs + 1))
        yield lambda check, case: status.update(styled("{}/{} {} {}", next(number), runs, check.name, case))


def _apart(outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """The same; what libraries print while a check runs goes to standard error."""
    while True:
        with redirect_stdout(sys.stderr):
            outcome = next(outcomes, None)
        if outcome is None:
            return
        yield outcome


def _reported(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """The same, each check printed when its last run is through, under the heading of its group."""
    from polyquant.cli.show import console
    from polyquant.testing.catalog import ALL

    groups, heading = {each.name: each.group for each in ALL}, ""
    for check, runs in groupby(outcomes, key=lambda outcome: outcome.check):
        together = list(runs)
        if groups[check] != heading:
            heading = groups[check]
            console.print(heading, style="bold")
        _print_check(check, together)
        yield from together


def _print_check(check: str, runs: Sequence[Outcome]) -> None:
    """One check: how its worst runs ended, and each reason once, with its cure."""
    from rich.padding import Padding

    from polyquant.cli.show import console
    from polyquant.cli.terminal import styled

    counted = Counter(outcome.status for outcome in runs)
    worst: Status = next(status for status in WORST if status in counted)
    others = ", ".join(f"{count} {status}" for status, count in counted.items()) if len(counted) > 1 else ""
    size = others or (f"{len(runs)} runs" if len(runs) > 1 else "")
    seconds = sum(outcome.seconds for outcome in runs)
    took = f"{size}{', ' if size else ''}{seconds:.1f} s"
    console.print(styled(f"  {MARKS[worst]}  {{}}  [dim]{{}}[/]", check, took))
    reasons: dict[tuple[str, str], list[str]] = {}
    for outcome in runs:
        if outcome.reason:
            reasons.setdefault((outcome.reason, outcome.cure), []).append(outcome.case)
    for (reason, cure), cases in reasons.items():
        where = ", ".join(case for case in cases[:3] if case) + (
            f" and {len(cases) - 3} more" if len(cases) > 3 else ""
        )
        style = "" if cure else "dim"
        console.print(Padding(f"{where}: {reason}" if where else reason, (0, 0, 0, 8)), style=style)
        if cure:
            console.print(Padding(styled("cure: [bold]{}[/]", cure), (0, 0, 0, 8)))


def _summary(name: str, outcomes: Sequence[Outcome]) -> None:
    from polyquant.cli.show import console
    from polyquant.cli.terminal import styled

    checks = {check: {run.status for run in runs} for check, runs in groupby(outcomes, key=lambda run: run.check)}
    worst = Counter(next(status for status in WORST if status in statuses) for statuses in checks.values())
    seconds = sum(outcome.seconds for outcome in outcomes)
    told = ", ".join(f"{worst[status]} {status}" for status in WORST if worst[status])
    verdict = "[red]{} breaks promises[/]" if worst["failed"] else "[green]{} keeps its promises[/]"
    console.print(styled(f"{verdict}: of {{}} checks {{}}, in {{}} s", name, len(checks), told, f"{seconds:.0f}"))
