"""The command line in processes of its own: exit codes, JSON, help from typed options, words for bad input."""

import json
import re

import pytest


def test_listing(run_python):
    result = run_python("backends", "--json")
    assert result.returncode == 0, result.stderr
    listed = json.loads(result.stdout)
    assert "bitsandbytes" in [card["name"] for card in listed["backends"]]


def test_a_query_that_nothing_satisfies_names_the_nearest(run_python):
    result = run_python("backends", "--bits", "17")
    assert result.returncode == 1
    assert "No installed backend satisfies all of that" in result.stdout
    assert "bitsandbytes misses: bits are 4, 8, not 17" in result.stdout


def test_help_shows_the_options_of_the_backend_named(run_python):
    plain, named = run_python("run", "--help"), run_python("run", "--backend", "bitsandbytes", "--help")
    assert "Options of bitsandbytes" not in plain.stdout
    assert "Options of bitsandbytes" in named.stdout
    for flag in ("--bits", "--quant-type", "--double-quant", "--compute-dtype", "--skip"):
        assert flag in named.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("run", "m", "-b", "bitsandbites", "hello"),
            "no backend 'bitsandbites'; installed: .*Did you mean 'bitsandbytes'",
        ),
        (
            ("run", "m", "-b", "bitsandbytes", "--quant-type", "nf5", "hello"),
            "quant_type must be 'nf4' or 'fp4', got 'nf5'",
        ),
        (
            ("run", "m", "-b", "bitsandbytes", "--bits", "8", "--double-quant", "hello"),
            "double_quant does not apply to 8 bit",
        ),
        (("run", "m", "-b", "bitsandbytes", "--bitz", "8", "hello"), "No such option.*--bitz"),
        (("load", "./nowhere", "-b", "bitsandbytes"), "./nowhere: no such file or folder"),
        (
            ("load", "m", "-b", "bitsandbytes", "--offload", "gpu"),
            "offload must be 'error', 'cpu' or 'disk', got 'gpu'. Did you mean 'cpu'",
        ),
        (("load", "m", "-b", "bitsandbytes", "--max-memory", "6GiB"), "--max-memory must look like '0=6GiB,cpu=24GiB'"),
        (
            ("chat", "m", "-b", "bitsandbytes", "--template", "thinking"),
            "--template must look like 'enable_thinking=false",
        ),
        (("quantize", "m", "--out", "x"), "name the backend to quantize with"),
        (("quantize", "m", "--out", "tests", "-b", "bitsandbytes"), "tests exists; choose another folder"),
        (("frobnicate",), "No such command 'frobnicate'"),
        (("pull", "m"), "No such command 'pull': polyquant load MODEL fetches what it needs"),
        (("train", "m"), "No such command 'train': polyquant finetune MODEL"),
        (("plan", "m", "--memory", "8"), "8 is a number of bytes, and no model fits in so few; was 8GiB meant"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_use_exits_with_two_or_one_and_says_why(run_python, arguments, message):
    result = run_python(*arguments)
    assert result.returncode == (1 if "exists" in message else 2)
    assert re.search(message, result.stderr.replace("│", "").replace("\n", " ")), result.stderr
    assert "Traceback" not in result.stderr


def test_doctor(bitsandbytes, run_python):
    well = run_python("doctor", "bitsandbytes", "--device", "cpu", "--json")
    assert (well.returncode, json.loads(well.stdout)[0]["problems"]) == (0, [])
    ill = run_python("doctor", "bitsandbytes", "--device", "mps")
    assert ill.returncode == 1
    assert "does not run on mps" in ill.stdout
    assert "fix: use one of cpu" in ill.stdout
    assert "packed kernels: " in ill.stdout


def test_doctor_shows_a_broken_plugin_as_a_row(make_plugin, tmp_path, run_python):
    make_plugin("import a_library_that_is_missing")
    import os

    site = str(tmp_path / "site" / "polyquant-acme")
    result = run_python("doctor", env={**os.environ, "PYTHONPATH": site})
    assert result.returncode == 1
    assert "acme (polyquant-acme 1.0) on auto: does not run" in result.stdout
    assert "bitsandbytes (polyquant-bitsandbytes" in result.stdout
    listing = run_python("backends", env={**os.environ, "PYTHONPATH": site})
    assert listing.returncode == 0
    assert "acme broken: polyquant-acme 1.0: import failed" in listing.stdout


def test_words_of_other_tools_lead_to_commands_that_there_are():
    from polyquant.cli.build import build
    from polyquant.cli.elsewhere import ELSEWHERE
    from typer.main import get_command

    commands = get_command(build(None)).commands
    assert not set(ELSEWHERE) & set(commands)
    for place in ELSEWHERE.values():
        named = re.findall(r"polyquant ([a-z]+)", place)
        assert named
        assert not set(named) - set(commands)


def test_no_arguments_shows_help(run_python):
    assert "Usage" in run_python().stdout
    assert run_python("--version").stdout.strip().count(".") == 2


def test_completion_knows_backends_and_their_options(run_python):
    import os

    def complete(line: str) -> str:
        words = line.split(" ")
        env = {
            **os.environ,
            "_POLYQUANT_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        }
        return run_python(env=env).stdout

    assert "bitsandbytes" in complete("polyquant run --backend bits")
    assert "--quant-type" in complete("polyquant run -b bitsandbytes --quan")
    assert "fp4" in complete("polyquant run -b bitsandbytes --quant-type f")


def test_switches_of_the_chat_template_are_typed():
    from polyquant.cli.options import switches_of

    assert switches_of("enable_thinking=false, level=2,mode=brief") == {
        "enable_thinking": False,
        "level": 2,
        "mode": "brief",
    }
    assert switches_of(None) == {}
