"""The repository's shape: layout, one-way light modules, generated parts, nothing undocumented."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import msgspec
import polyquant
import pytest
import yaml
from polyquant import errors
from polyquant.comparison.records import Result
from polyquant.contract import hookspecs
from polyquant.registry.catalogue import catalogue

ROOT = Path(__file__).parent.parent
TEMPLATE = ROOT / "core" / "polyquant" / "authoring" / "template"  # a plugin, as `polyquant new-backend` writes it
CORE = sorted(path for path in (ROOT / "core").rglob("*.py") if TEMPLATE not in path.parents)
PLUGINS = [*sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml")), TEMPLATE]
LIGHT = ("__init__.py", "plugin.py", "options.py")
HEAVY = re.compile(r"^(?:from|import) (?:torch|transformers|accelerate|peft|bitsandbytes)\b", re.MULTILINE)


def test_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.partition("/")[0] for name in tracked}
    visible = {name for name in top if not name.startswith(".")}
    allowed = {
        "pyproject.toml",
        "core",
        "plugins",
        "tests",
        "docs",
        "README.md",
        "noxfile.py",
        "LICENSE",
        "constraints.txt",
    }
    assert visible <= allowed


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda path: path.name)
def test_plugins_have_one_shape(folder):
    (package,) = (folder / "src").glob("polyquant_*")
    assert {"__init__.py", "plugin.py", "options.py", "_load.py", "_layers.py"} <= {
        path.name for path in package.iterdir()
    }
    assert len(ast.parse((package / "__init__.py").read_text()).body) == 1, "__init__.py holds a docstring only"
    assert (folder / "README.md").stat().st_size > 300
    assert list((folder / "tests").glob("test_*.py"))
    for name in LIGHT:
        assert not HEAVY.search((package / name).read_text()), f"{name} imports something heavy"


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda path: path.name)
def test_no_plugin_imports_another(folder):
    others = {f"polyquant_{path.name.replace('-', '_')}" for path in PLUGINS if path != folder}
    for path in (folder / "src").rglob("*.py"):
        assert not [name for name in imported_by(path) if name.partition(".")[0] in others], path


def test_the_core_imports_no_plugin_and_only_the_registry_touches_pluggy():
    for path in CORE:
        names = imported_by(path)
        assert not [name for name in names if name.startswith("polyquant_")], path
        if path.name not in ("registry.py", "markers.py"):
            assert "pluggy" not in names, path
            assert not any(name == "importlib.metadata.entry_points" for name in names), path


@pytest.mark.parametrize(
    "path",
    [*CORE, *(file for folder in PLUGINS for file in (folder / "src").rglob("*.py"))],
    ids=lambda path: path.stem,
)
def test_no_file_is_a_room_for_two_owners(path):
    assert len(path.read_text().splitlines()) <= 300


def imported_by(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_every_hook_is_documented_and_has_no_defaults():
    for hook in (*hookspecs.REQUIRED, *hookspecs.OPTIONAL):
        function = getattr(hookspecs.QuantBackend, hook)
        assert inspect.getdoc(function), hook
        parameters = inspect.signature(function).parameters.values()
        assert all(parameter.default is inspect.Parameter.empty for parameter in parameters), hook
    hooks = {name for name, member in vars(hookspecs.QuantBackend).items() if callable(member)}
    assert hooks == {*hookspecs.REQUIRED, *hookspecs.OPTIONAL}


def test_every_public_name_is_documented():
    for name in polyquant.__all__:
        assert inspect.getdoc(getattr(polyquant, name)), name


def test_every_error_is_documented_in_the_reference():
    reference = (ROOT / "docs" / "reference" / "errors.md").read_text()
    for name, member in vars(errors).items():
        if isinstance(member, type) and issubclass(member, errors.PolyquantError):
            assert f"`{name}`" in reference, name


def test_every_option_is_described():
    for info in polyquant.backends():
        for option in polyquant.options.describe_options(info.options):
            assert option.description, f"{info.name}: {option.name}"


def test_generated_parts_are_up_to_date():
    result = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"run: python docs/generate.py\n{result.stderr}"


def test_links_in_markdown_lead_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "plugins").glob("*/README.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


def test_files_speak_of_no_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    own = re.compile(r"/work/|/tmp/pq|/opt/wheels")
    for name in tracked:
        if name != "tests/test_repository.py" and name.endswith((".py", ".md", ".toml", ".txt", ".yml", "run")):
            assert not own.search((ROOT / name).read_text(encoding="utf-8")), name


def test_the_catalogue_has_every_plugin_of_this_repository():
    packages = {}
    for path in ROOT.glob("plugins/*/pyproject.toml"):
        project = tomllib.loads(path.read_text())["project"]
        packages |= dict.fromkeys(project["entry-points"]["polyquant.backends"], project["name"])
    assert {name: known.package for name, known in catalogue().items()} == packages


def test_the_core_names_no_backend_in_a_list_of_its_own():
    """What the core knows of backends is in the catalogue, which is written from their cards."""
    for path in CORE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict):
                parts = [*node.keys, *node.values] if isinstance(node, ast.Dict) else node.elts
                named = {part.value for part in parts if isinstance(part, ast.Constant)} & set(catalogue())
                marks = path.name == "checks.py" and named == {"gptq", "awq"}  # quant_methods of sidecar files
                assert len(named) < 2 or marks, f"{path}:{node.lineno} lists {sorted(named)}"


def test_cards_and_measurements_agree():
    """Each preset that was measured has its figure, to three digits, on its card; no other has one.

    Left out: a preset of whose type the model's own weights were, which nothing more is lost in.
    """
    results = msgspec.json.decode((ROOT / "docs" / "reference" / "measured.json").read_bytes(), type=dict[str, Result])
    measured = {
        name: float(f"{result.quality.kl_mean:.3g}")
        for name, result in results.items()
        if not name.startswith("dense:") and result.quality and result.quality.kl_mean > 1e-6
    }
    cards = [polyquant.backend(name).info for name in catalogue()]
    assert measured == {f"{info.name}:{preset}": kl for info in cards for preset, kl in info.measured_kl.items()}
    assert {name for name in results if name not in measured} == {"dense:float32", "dense:bfloat16", "gguf:Q4_1"}


def test_the_wheel_has_what_is_no_python(tmp_path):
    """py.typed, for type checkers of those who use polyquant, and the data files that modules read."""
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "core"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    data = {name.removeprefix("core/") for name in tracked.split() if not name.endswith(".py")}
    assert {"polyquant/py.typed", "polyquant/registry/catalogue.json"} <= data <= names


@pytest.mark.parametrize("package", ["polyquant", "polyquant.plugin", "polyquant.testing"])
def test_what_a_package_makes_public_is_in_its_list(package):
    """`__all__` has every name that the package's `__init__.py` defines or takes from polyquant, and no other."""
    path = ROOT / "core" / package.replace(".", "/") / "__init__.py"
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("polyquant"):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    listed = importlib.import_module(package).__all__
    assert listed == sorted(listed, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert {name for name in names if not name.startswith("_")} == set(listed)
    assert all(getattr(importlib.import_module(package), name) is not None for name in listed)


def lint_versions():
    """Tool -> version, of pyproject's lint group."""
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["lint"]
    return dict(line.split("==") for line in group if "==" in line)


def test_pre_commit_has_the_versions_of_the_lint_session():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    versions = {"ruff": next(each["rev"] for each in hooks if "ruff" in each["repo"]).removeprefix("v")}
    for each in hooks:
        for hook in each["hooks"]:
            versions |= dict(line.split("==") for line in hook.get("additional_dependencies", ()) if "==" in line)
    assert versions == lint_versions()


def test_the_workflow_runs_what_runs_here_and_a_fault_comes_with_the_doctors_answer():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (
        next(step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
        == "3.11"
    )
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    fault = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "fault.yml").read_text())
    asked = [part for part in fault["body"] if part["attributes"]["label"] == "polyquant doctor --json"]
    assert [part["validations"]["required"] for part in asked] == [True]


def test_contributing_leads_from_a_clone_to_a_test_in_five_commands():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    commands = text.partition("```sh\n")[2].partition("```")[0].splitlines()
    assert len(commands) == 5
    for path in re.findall(r"tests/\w+\.py", " ".join(commands)):
        assert (ROOT / path).exists()
    for target in re.findall(r"\]\(([^)#:]+)", text):
        assert (ROOT / ".github" / target).exists(), target
