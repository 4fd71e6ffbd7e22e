"""Importing, listing and querying stay light, whatever is installed."""

import resource
import statistics
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "accelerate", "bitsandbytes", "peft", "numpy", "huggingface_hub", "safetensors")
NEEDLESS = ("rich", "pygments", "markdown_it", "logging.config", "asyncio", "concurrent", "ctypes", "polyquant.api",
            "polyquant.loading", "polyquant.comparison", "polyquant.cli.show")  # fmt: skip
"""What a list or a help of commands can do without, which each takes milliseconds."""
LISTING, HELPING = 16.0, 10.0
"""Times the CPU time of a bare interpreter: 12 and 8 where nothing else has the cores, a fifth more where others do. It was
29 and 25 before cards were read from files and commands imported one by one."""


def command(*words):
    return (
        f"import sys; sys.argv = ['polyquant', *{words}]\ntry:\n    import polyquant.__main__\nexcept SystemExit: pass"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import polyquant; polyquant.backends()",
        "import polyquant; polyquant.backends(bits=4, device='cpu', on_the_fly=True)",
        "import polyquant; [polyquant.backend(info.name).config({}) for info in polyquant.backends()]",
        command("backends", "--json"),
        command("run", "--backend", "bitsandbytes", "--help"),
    ],
    ids=["list", "query", "configure", "command line", "help"],
)
def test_nothing_heavy_is_imported(run_python, code):
    result = run_python(
        code=f"{code}\nimport sys; print('heavy:', [name for name in {HEAVY} if name in sys.modules])", fresh=True
    )
    assert result.stdout.rstrip().endswith("heavy: []"), result.stdout[-300:] + result.stderr


@pytest.mark.parametrize("words", [("backends",), ("backends", "--json"), ("backends", "--saves"), ("--help",)])
def test_a_list_imports_no_plugin_and_nothing_that_it_can_do_without(run_python, words):
    told = f"print('needless:', [name for name in sys.modules if name.startswith('polyquant_') or name in {NEEDLESS}])"
    result = run_python(code=f"{command(*words)}\n{told}", fresh=True)
    assert result.stdout.rstrip().endswith("needless: []"), result.stdout[-300:] + result.stderr


def cpu_seconds(words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_lists_take_little_more_than_python_itself():
    """By CPU time, which other work on the machine disturbs least; medians of runs that take turns."""
    commands = [("-c", "pass"), ("-m", "polyquant", "backends"), ("-m", "polyquant", "--help")]
    for words in commands:  # compiles, once
        cpu_seconds(words)
    bare, listing, helping = (
        statistics.median(times) for times in zip(*(map(cpu_seconds, commands) for _ in range(7)), strict=True)
    )
    assert listing / bare < LISTING, f"{listing / bare:.1f}"
    assert helping / bare < HELPING, f"{helping / bare:.1f}"
