"""A plugin cannot take down a command: what it prints, ends, takes or never returns is kept apart, and has its name."""

import json
import os
import sys
import threading
import time

import pytest
from polyquant.errors import BackendFailed, BrokenBackend
from polyquant.registry.backend import Backend
from polyquant.registry.registry import Registry
from polyquant.support.containing import Late, output_to, within

from .conftest import GOOD_PLUGIN

ENDS = "import sys\nsys.exit(3)\n"
PRINTS = "print('welcome to acme')\n" + GOOD_PLUGIN
SLOW = "import time\ntime.sleep(3.2)\n" + GOOD_PLUGIN
HANGS = GOOD_PLUGIN.replace("return []", "import time\n        while True:\n            time.sleep(0.1)", 1)


@pytest.fixture
def run(make_plugin, run_python, tmp_path):
    """A command in a process of its own, that has the plugin acme."""

    def with_plugin(code, *words):
        make_plugin(code)
        paths = [str(tmp_path / "site" / "polyquant-acme"), *filter(None, sys.path)]
        return run_python(*words, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})

    return with_plugin


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (ENDS, "import failed with SystemExit: 3 (polyquant_acme.py:2): a plugin must not end the program"),
        ("raise BaseException('no')", "import failed with BaseException: no"),
        (GOOD_PLUGIN.replace("return BackendInfo(", "raise SystemExit\n        return BackendInfo("), "backend_info failed with SystemExit"),
        (GOOD_PLUGIN.replace("class Plugin:", "class Plugin:\n    def __dir__(self):\n        raise SystemExit(4)\n"), "its hooks cannot be read: SystemExit: 4"),
    ],
    ids=["exit", "base exception", "card", "methods"],
)  # fmt: skip
def test_a_plugin_that_ends_the_program_is_a_row(run, code, said):
    found = run(code, "backends", "--json")
    assert found.returncode == 0, found.stderr
    (miss,) = [miss for miss in json.loads(found.stdout)["misses"] if miss["name"] == "acme"]
    assert said in miss["reasons"][0]


def test_ctrl_c_while_a_plugin_is_imported_ends_the_command(make_plugin):
    make_plugin("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        Registry().info("acme")


def test_what_a_plugin_prints_is_no_part_of_the_output_and_has_its_name(run):
    found = run(PRINTS, "backends", "--json")
    assert "acme" in [card["name"] for card in json.loads(found.stdout)["backends"]]
    assert found.stderr.strip() == "polyquant: polyquant-acme 1.0 printed while it was imported: 'welcome to acme'"


def test_a_slow_plugin_is_named(run):
    found = run(SLOW, "doctor", "acme", "--json")
    (diagnosis,) = json.loads(found.stdout)
    assert diagnosis["problems"] == []
    assert diagnosis["notes"][0].startswith("took 3.")
    assert "polyquant: polyquant-acme 1.0 took 3." in found.stderr


@pytest.mark.parametrize("hook", ["validate_environment", "load"])
@pytest.mark.parametrize("code", ["print('noise')", "raise SystemExit(5)"])
def test_hooks_are_contained_too(make_plugin, capsys, hook, code):
    body, given = {"validate_environment": ("return []", {"device": "cpu"}), "load": ("return LoadedModel(", {"request": None, "config": None})}[hook]  # fmt: skip
    make_plugin(GOOD_PLUGIN.replace(body, f"{code}\n        {body}", 1))
    raised = ""
    try:
        Registry().call("acme", hook, **given)
    except BackendFailed as error:
        raised = str(error)
    assert ("SystemExit: 5" in raised) == ("SystemExit" in code)
    assert capsys.readouterr().out == ""


def test_a_check_that_never_returns_is_told_with_its_line(make_plugin):
    make_plugin(HANGS)
    started = time.monotonic()
    with pytest.raises(
        BackendFailed, match=r"acme has not answered validate_environment in 0.5 s \(polyquant_acme.py:\d+\)"
    ):
        Backend("acme", Registry()).problems_in_time(seconds=0.5)
    assert time.monotonic() - started < 10
    print("this thread's output is its own", flush=True)


def test_the_doctor_goes_on_after_a_check_that_never_returns(run, monkeypatch):
    found = run(HANGS, "doctor", "acme", "--seconds", "2", "--json")
    (diagnosis,) = json.loads(found.stdout)
    assert "acme has not answered validate_environment in 2 s (polyquant_acme.py:" in diagnosis["problems"][0]["what"]
    assert found.returncode == 1


def test_a_plugin_for_another_polyquant_is_refused_with_the_command(make_plugin, tmp_path):
    make_plugin()
    metadata = tmp_path / "site" / "polyquant-acme" / "polyquant_acme-1.0.dist-info" / "METADATA"
    written = metadata.read_text()
    metadata.write_text(written + "Requires-Dist: polyquant>=9; extra == 'more'\nRequires-Dist: no ! requirement\n")
    assert Registry().info("acme").name == "acme"
    metadata.write_text(written + "Requires-Dist: polyquant>=9\n")
    with pytest.raises(
        BrokenBackend, match=r"made for another polyquant. It requires polyquant>=9, and .* pip install"
    ):
        Registry().info("acme")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (ENDS, "a plugin must not end the program"),
        (PRINTS, "the plugin printed while it was imported: 'welcome to acme'; let it only define things"),
        (SLOW, "the plugin took 3."),
    ],
    ids=["exit", "prints", "slow"],
)
def test_check_backend_catches_it(run, code, reason):
    found = run(code, "check-backend", "acme", "--check", "imports_nothing_heavy", "--json")
    assert found.returncode == 1
    assert found.stdout, found.stderr
    answer = json.loads(found.stdout)
    assert any(reason in said for said in [answer["reason"], *(outcome["reason"] for outcome in answer["outcomes"])])


def test_output_is_parted_by_thread(capsys):
    entered, leave, other = threading.Event(), threading.Event(), sys.stderr

    def work():
        with output_to(other):
            entered.set()
            leave.wait(30)
            print("there")

    before, thread = sys.stdout, threading.Thread(target=work)
    thread.start()
    assert entered.wait(30)
    with output_to(other):
        pass
    print("here")
    leave.set()
    thread.join()
    assert sys.stdout is before
    assert capsys.readouterr() == ("here\n", "there\n")


def test_within_gives_raises_and_is_late():
    assert within(30, lambda: 5) == 5
    assert within(30, lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        within(30, lambda: 1 / 0)
    forever = threading.Event()
    with pytest.raises(Late) as caught:
        within(0.2, forever.wait)
    forever.set()
    assert any(file == threading.__file__ for file, _ in caught.value.lines)
