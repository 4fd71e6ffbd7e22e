"""Benchmarks of the packed runtime, kernel="packed": `nox -s bench -- --packed`.

python docs/examples/bench_packed.py [PART ...] [--only WORD ...] [--rounds 3] [--threads 2] [--json FILE]

  speed          tokens a second of every preset that has a place in the packed layout, against llama.cpp
  models         the same of two models of a billion weights, in NF4
  architectures  models whose steps the kernels do not make as a whole, in NF4 against dense
  divergence     what the kernels change: KL to the library's product, and greedy tokens
  training       seconds a step of LoRA, against the library

Each cell is measured in a process of its own, all of them in turn, round after round; tables show the median with the
least and the most, and ratios of medians. A cell that fails says why, and the others go on. Random models and
checkpoints are made once, into the folder `bench` of polyquant's cache: delete what is to be made anew. A backend that
has an environment of its own is measured by running this script there. Keep the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import msgspec
from bench_packed.cells import FULL, SMALL, Answer, Asked, Cell
from bench_packed.presets import LeftOut
from bench_packed.sources import is_there
from polyquant.comparison.records import OTHER_WORK
from polyquant.packed_weights import kernels
from polyquant.support.files import write_atomically
from polyquant.support.machine import this_machine
from polyquant.support.processes import account, run_logged
from polyquant.support.progress import SILENT

PARTS = ("speed", "models", "architectures", "divergence", "training")
LIBRARIES = ("polyquant-kernels", "llama-cpp-python")


class Row:
    """A cell with what its processes said."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.answers, self.reason = cell, list[Answer](), ""

    def values(self, figure: str) -> list[Any]:
        """Of each round."""
        return [answer.figures[figure] for answer in self.answers if figure in answer.figures]

    def ratio(self, figure: str, other: Row | None) -> float | None:
        """Of the medians; None where there is no `other`, or either has no such figure."""
        own, theirs = self.values(figure), other.values(figure) if other else []
        return statistics.median(own) / statistics.median(theirs) if own and theirs else None

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        rounds = [msgspec.to_builtins(answer) for answer in self.answers]
        return {"cell": msgspec.to_builtins(self.cell), "rounds": rounds, "reason": self.reason}


def main() -> None:
    arguments = parse()
    asked = Asked(sizes=SMALL if arguments.small else FULL, embeddings=arguments.embeddings)
    chosen = {name: rows_of(name, asked, arguments.only) for name in arguments.parts or PARTS}
    if not any(rows for rows, _ in chosen.values()):
        sys.exit(f"--only: no cell of {', '.join(chosen)} has {' or '.join(arguments.only)} in its name; see --list")
    head = {
        "machine": msgspec.to_builtins(this_machine(LIBRARIES)), "kernels": kernels.told(),
        "threads": arguments.threads, "rounds": arguments.rounds, "asked": msgspec.to_builtins(asked),
    }  # fmt: skip
    print(f"{this_machine().processor}, {arguments.threads} threads; {kernels.told()}")
    print(f"rounds: {arguments.rounds}; embeddings of packed models whose speed is measured: {arguments.embeddings}")
    for name, (rows, left_out) in chosen.items():
        if not arguments.list:
            for done in measured(name, rows, arguments):
                say(f"{name}, {done}")
                if arguments.json:
                    write(arguments.json, head, chosen)
        print(f"\n## {name}\n\n{listing(rows) if arguments.list else table(name, rows)}")
        for each in left_out:
            print(f"\nleft out: {each.name}: {each.reason}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all where left out")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cells with one of these in their names")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--embeddings",
        default="auto",
        choices=("auto", "keep", "16bit", "8bit", "4bit"),
        help="of packed models whose speed is measured; llama.cpp keeps them in 16 bits in what polyquant makes for it",
    )
    parser.add_argument("--small", action="store_true", help="few tokens and tiny models, to see that all works")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for a process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures of every round; renewed after each")
    parser.add_argument("--list", action="store_true", help="the cells, and nothing is measured")
    arguments = parser.parse_args()
    if strange := [name for name in arguments.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(strange)}; there are {', '.join(PARTS)}")
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--rounds and --threads must be 1 or more")
    return arguments


def part(name: str) -> ModuleType:
    return import_module(f"bench_packed.{name}")


def rows_of(name: str, asked: Asked, only: Sequence[str]) -> tuple[list[Row], list[LeftOut]]:
    """The cells of a part with one of `only` in their names, and those that they are compared with.

    A word that is a whole name stands for that cell alone.
    """
    listed = list(part(name).cells(asked))
    cells = {each.name: each for each in listed if isinstance(each, Cell)}
    wanted = [
        cell
        for cell in cells.values()
        if not only or any(word == cell.name or (word not in cells and word in cell.name) for word in only)
    ]
    names = {cell.name for cell in wanted} | {cell.against for cell in wanted}
    left_out = [each for each in listed if isinstance(each, LeftOut)]
    return [Row(cell) for cell in cells.values() if cell.name in names], left_out


def measured(name: str, rows: Sequence[Row], arguments: argparse.Namespace) -> Iterator[str]:
    """Measures the rows in turn, round after round; says what is done."""
    with TemporaryDirectory() as folder:
        prepared: dict[str, str] = {}  # name of a source -> why it could not be made
        for row in rows:
            source = row.cell.source
            if source.name not in prepared and not is_there(source):
                yield f"making {source.name}"
                prepared[source.name] = child("sources", row.cell, Path(folder), arguments).reason
            row.reason = prepared.get(source.name, "")
        rounds = min(arguments.rounds, getattr(part(name), "ROUNDS", arguments.rounds))
        for number in range(rounds):
            for row in rows:
                if row.reason:
                    continue
                yield f"round {number + 1} of {rounds}: {row.cell.name}"
                answer = child(name, row.cell, Path(folder), arguments)
                row.answers += [] if answer.reason else [answer]
                row.reason = answer.reason  # it is not tried again
                yield f"round {number + 1} of {rounds}: {row.cell.name}: {row.reason or shown(answer)}"


def child(module: str, cell: Cell, folder: Path, arguments: argparse.Namespace) -> Answer:
    """What a module of the package says of a cell, in a process of its own; or how that ended without an answer."""
    asked, answer = folder / "cell.json", folder / "answer.json"
    asked.write_text(cell.to_json(), encoding="utf-8")
    answer.unlink(missing_ok=True)
    ended = run_logged(
        f"bench_packed.{module}", [str(asked), str(answer)], folder / "log", limit_seconds=arguments.limit,
        progress=SILENT, environment={"OMP_NUM_THREADS": str(arguments.threads)},
    )  # fmt: skip
    if answer.exists():
        return msgspec.json.decode(answer.read_bytes(), type=Answer)
    return Answer(figures={}, reason=account(ended, arguments.limit).partition("; it said last:")[0])


def table(name: str, rows: Sequence[Row]) -> str:
    """As Markdown, a line for each cell: figures as median (least to most), and their ratio to another cell's."""
    figures, by_name = part(name).FIGURES, {row.cell.name: row for row in rows}
    compared = part(name).COMPARED
    titles = [""]
    for figure, title in figures.items():
        titles += [title, "ratio"] if figure in compared else [title]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        other = by_name.get(row.cell.against)
        line = [row.cell.name + mark(row)]
        for figure in figures:
            line.append(spread(row.values(figure)))
            if figure in compared:
                ratio = row.ratio(figure, other)
                line.append("" if ratio is None else f"{ratio:.2f}")
        if row.reason:
            line[1] = f"{line[1]} {escaped(row.reason)}".strip()
        lines.append(line)
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = [part(name).RATIO] if compared else []
    if any(mark(row) for row in rows):
        notes.append(f"*: other processes took more than {OTHER_WORK:.0%} of the cores meanwhile")
    return "\n\n".join([text, *notes])


def escaped(reason: str) -> str:
    """A reason in a line, as a cell of a table."""
    return " ".join(reason.split()).replace("|", "\\|")


def mark(row: Row) -> str:
    beside = any((answer.other_work_share or 0.0) > OTHER_WORK for answer in row.answers)
    return " *" if beside else ""


def spread(values: Sequence[Any]) -> str:
    """Numbers as their median, with the least and the most; texts as they are, each once."""
    if not values or not all(isinstance(value, (int, float)) for value in values):
        return ", ".join(dict.fromkeys(map(str, values)))
    median, least, most = map(number, (statistics.median(values), min(values), max(values)))
    return f"{median} ({least} to {most})" if len(values) > 1 else median


def number(value: float) -> str:
    """With three digits that count, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def shown(answer: Answer) -> str:
    """An answer in a line."""
    return ", ".join(f"{name} {spread([value])}" for name, value in answer.figures.items())


def listing(rows: Sequence[Row]) -> str:
    return "\n".join(f"- {row.cell.name}" + f" against {row.cell.against}" * bool(row.cell.against) for row in rows)


def write(path: Path, head: dict[str, Any], chosen: dict[str, tuple[list[Row], list[LeftOut]]]) -> None:
    """All that is known so far."""
    parts = {name: {"rows": [row.as_plain() for row in rows], "left_out": msgspec.to_builtins(left_out)}
             for name, (rows, left_out) in chosen.items()}  # fmt: skip
    write_atomically(path, json.dumps({**head, "parts": parts}, indent=1) + "\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
