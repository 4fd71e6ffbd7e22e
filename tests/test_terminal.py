"""What the commands show: names cannot steer the terminal or pose as markup, and an output that is lost is said."""

import ast
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from polyquant.cli.output import visible
from polyquant.cli.terminal import Terminal, styled
from polyquant.comparison.report.exports import as_csv
from polyquant.comparison.result import read_comparison
from polyquant.errors import ConfigError
from polyquant.models.resolve import resolve
from polyquant.support.cache import cache_folder
from polyquant.support.files import atomic_folder
from msgspec.structs import replace
from rich.live import Live
from rich.table import Table

CLI = Path(__file__).parent.parent / "core" / "polyquant" / "cli"
EVIL = "a\x1b]0;title\x07\x1b[2J\x9b31m\u202eb\r[red]c[/] :smile: é"
SHOWN = "a\\u001b]0;title\\u0007\\u001b[2J\\u009b31m\\u202eb\\u000d[red]c[/] :smile: é"


def test_what_steers_a_terminal_is_shown_as_json_writes_it():
    assert visible(EVIL) == SHOWN
    assert visible("two\nlines\tand é \U0001f600") == "two\nlines\tand é \U0001f600"
    text = json.dumps({"name": EVIL}, ensure_ascii=False)
    assert json.loads(visible(text)) == {"name": EVIL}
    assert visible(os.fsdecode(b"bad\xff")) == "bad\\udcff"


def shown(draw):
    console = Terminal()
    console._force_terminal, console.width = True, 200
    with console.capture() as captured:
        draw(console)
    return captured.get()


def tabled(console):
    table = Table(title=EVIL, caption=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    console.print(table)


def live(console):
    with Live(EVIL, console=console, auto_refresh=False):
        pass


@pytest.mark.parametrize(
    "draw",
    [
        lambda console: console.print(EVIL), tabled,
        lambda console: console.print(styled("[bold]{}[/] and {}", EVIL, "[x]\\")),
        live,
    ],
    ids=["text", "table", "styled", "live"],
)  # fmt: skip
def test_a_console_shows_names_as_text(draw):
    text = shown(draw)
    assert "title" in text
    assert not any(part in text for part in ("\x1b]", "\x07", "\x1b[2J", "\x9b", "\u202e", "\r["))
    assert "[red]c[/] :smile:" in text


def test_every_word_of_the_commands_passes_there():
    strange = []
    for path in CLI.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            printing = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            consoles = isinstance(node, ast.ImportFrom) and node.module in ("rich.console", "rich.markup")
            allowed = {"output.py": printing, "terminal.py": consoles}.get(path.name, False)
            strange += [f"{path.name}:{node.lineno}"] if (printing or consoles) and not allowed else []
    assert not strange


def test_a_command_shows_names_as_text(run_python, tmp_path):
    found = run_python("plan", str(tmp_path / EVIL))
    assert found.returncode == 2
    assert "\\u001b]0;title\\u0007" in found.stderr
    assert not set(found.stderr) & set("\x1b\x07\x9b\u202e")


@pytest.mark.parametrize("words", [["backends"], ["backends", "--json"], ["--help"]])
def test_an_output_that_is_lost_is_said(words):
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "polyquant", *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert found.returncode == 1
    assert found.stderr.startswith("polyquant: standard output cannot be written: [Errno 28] No space left")
    assert "Traceback" not in found.stderr


def test_an_output_of_another_encoding_ends_nothing(run_python, tmp_path):
    (tmp_path / "é±").mkdir()
    found = run_python("plan", str(tmp_path / "é±"), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert "\\xe9\\xb1" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_path_that_is_no_utf8_is_refused(run_python, tmp_path, monkeypatch):
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff")
    Path(strange).mkdir()
    found = run_python("plan", strange)
    assert found.returncode == 2
    assert "bad\\xff' is no UTF-8, and cannot be used; rename" in found.stderr
    with pytest.raises(ConfigError, match="no UTF-8"):
        resolve(strange)
    with pytest.raises(ConfigError, match="no UTF-8"), atomic_folder(Path(strange) / "out", overwrite=False):
        pass
    monkeypatch.setenv("POLYQUANT_CACHE", strange)
    with pytest.raises(ConfigError, match="no UTF-8"):
        cache_folder()


def test_a_cache_that_cannot_be_made_is_named(run_python, tmp_path):
    (tmp_path / "file").write_text("")
    environment = {**os.environ, "POLYQUANT_CACHE": str(tmp_path / "file" / "cache")}
    found = run_python("compare", "builtin:smollm2", "-c", "dense:float32", env=environment)
    assert found.returncode == 2
    assert f"POLYQUANT_CACHE is {tmp_path}/file/cache, and {tmp_path}/file is no folder" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\tx"])
def test_a_spreadsheet_finds_no_formula(name):
    run = read_comparison(Path(__file__).parent / "data" / "comparison.json")
    row = replace(run.rows[0], candidate=replace(run.rows[0].candidate, name=name))
    first, second, *_ = csv.DictReader(io.StringIO(as_csv(replace(run, rows=(row, *run.rows[1:])))))
    assert first["candidate"] == f"'{name}"
    assert second["candidate"] == run.rows[1].candidate.name
