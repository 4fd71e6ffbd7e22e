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
SURFACE = re.compile(r"polyquant\.(plugin|errors)(\.|$)")
LIGHT_SURFACE = ("polyquant.plugin", "polyquant.plugin.gguf", "polyquant.plugin.layouts", "polyquant.plugin.formats",
                 "polyquant.errors")  # fmt: skip
HEAVY_SURFACE = (
    "checkpoints",
    "experts",
    "layers",
    "calibration",
    "process",
)  # as `from polyquant.plugin import ...` names them
LIGHT_ROLES = {
    "__init__": "a docstring",
    "plugin": "the card",
    "options": "the options, and how a checkpoint stores them",
    "planning": "bytes from shapes, and what is refused",
    "arguments": "what a checkpoint's config says of weights and activations, read and written",
    "formats": "facts of the checkpoint format: block types, layouts, names of types",
    "names": "which tensor of a file is which of the model's",
}
HEAVY_ROLES = {
    "_load": "loading and saving",
    "_layers": "how modules store their weights, how they are described and trained",
    "_modules": "the modules, where the library has none of its own",
    "_kernels": "products with packed weights",
    "_decode": "packed weights to numbers, and back",
    "_pack": "packed weights in polyquant's layout: the hook pack, where _layers has no room for it",
    "_bits": "bit fields of packed bytes",
    "_codebooks": "fixed code books, and the weights that index them",
    "_quantize": "weights to packed ones, and the hook that makes a checkpoint",
    "_read": "reading a file format of its own",
    "_write": "writing it",
    "_metadata": "config and tokenizer as the metadata of such a file",
    "_checks": "what is checked of a file before the library reads it",
    "_worker": "what runs in a process of its own",
    "_library": "the library: its config objects, what it prints, and whether it works",
    "_runtime": "a runtime that is not torch",
    "_tokenizer": "its tokenizer, or the one that its files hold",
    "_sampling": "its choice of tokens",
}
"""The closed list of file roles; a plugin that needs another one brings it here, for all."""


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
    files = {path.stem: path for path in package.rglob("*.py")}
    assert {"__init__", "plugin", "options", "_load", "_layers"} <= files.keys()
    assert files.keys() <= {*LIGHT_ROLES, *HEAVY_ROLES}, "a file has a role that is in no list above"
    assert len(ast.parse(files["__init__"].read_text()).body) == 1, "__init__.py holds a docstring only"
    assert (folder / "README.md").stat().st_size > 300
    assert list((folder / "tests").glob("test_*.py"))


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda path: path.name)
def test_a_leading_underscore_means_torch_or_a_library(folder):
    """No other file of a plugin imports one when it is imported; a function of it may, when it is called."""
    for path in (folder / "src").rglob("*.py"):
        if path.stem.startswith("_") and path.stem != "__init__":
            assert any(map(is_heavy, modules_of(ast.parse(path.read_text())))), f"{path.name} imports nothing heavy"
        else:
            heavy = [name for name in modules_of(at_import(path)) if is_heavy(name)]
            assert not heavy, f"{path.name} imports {heavy}: begin its name with an underscore"


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_imports_nothing_of_the_core_but_its_surface(folder):
    for path in (folder / "src").rglob("*.py"):
        core = [name for name in modules_of(ast.parse(path.read_text())) if name.partition(".")[0] == "polyquant"]
        beside = [name for name in core if not SURFACE.match(name)]
        assert not beside, f"{path.name} imports {beside}: polyquant.plugin has what a plugin needs"
        hidden = [name for name in core if any(part.startswith("_") for part in name.split("."))]
        assert not hidden, f"{path.name} imports {hidden}, which the core keeps to itself"


def test_light_parts_of_the_surface_import_nothing_heavy():
    code = (
        f"import sys, {', '.join(LIGHT_SURFACE)}; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


def at_import(path: Path) -> ast.Module:
    """The syntax tree of a file, without what runs when a function of it is called."""

    class Emptied(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.Pass:  # noqa: N802  ast's name
            return ast.copy_location(ast.Pass(), node)

    return Emptied().visit(ast.parse(path.read_text()))


def modules_of(tree: ast.AST) -> list[str]:
    """What the tree imports, a name of the core with its module: 'torch', 'polyquant.plugin.checkpoints'."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = [alias.name for alias in node.names]
            inside = node.module.partition(".")[0].startswith("polyquant")
            names += [f"{node.module}.{part}" for part in parts] if inside else [node.module]
    return names


def is_heavy(name: str) -> bool:
    """Whether an import, as `modules_of` names it, is one of torch, a library, or something that imports them."""
    top, *inside = name.split(".")
    if top == "polyquant":
        module, _, part = name.rpartition(".")
        return module not in LIGHT_SURFACE or (module == "polyquant.plugin" and part in HEAVY_SURFACE)
    if top.startswith("polyquant_"):
        return any(part.startswith("_") for part in inside)
    return top not in sys.stdlib_module_names and top != "msgspec"


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda path: path.name)
def test_no_plugin_imports_another(folder):
    others = {f"polyquant_{path.name.replace('-', '_')}" for path in PLUGINS if path != folder}
    for path in (folder / "src").rglob("*.py"):
        assert not [name for name in imported_by(path) if name.partition(".")[0] in others], path


KERNELS = "polyquant_kernels"  # no plugin: what the core multiplies with


def test_the_core_imports_no_plugin_and_only_the_registry_touches_pluggy():
    for path in CORE:
        names = imported_by(path)
        assert not [name for name in names if name.startswith("polyquant_") and name != KERNELS], path
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


def test_no_circle_of_imports():
    """Neither between modules nor between rooms, which are the names right under `polyquant`."""
    modules = module_imports()
    assert modules["polyquant.api"] and modules["polyquant.comparison.result"], "the imports were not read"
    assert circles(modules) == []
    assert circles(rooms(modules)) == []


def test_a_circle_of_imports_is_found():
    chain = {"polyquant.a.one": {"polyquant.b.two"}, "polyquant.b.two": {"polyquant.c"}, "polyquant.c": set()}
    assert circles(chain) == circles(rooms(chain)) == []
    by_rooms = {**chain, "polyquant.c": {"polyquant.a.other"}, "polyquant.a.other": set()}
    assert circles(by_rooms) == []
    assert circles(rooms(by_rooms)) == [["a", "b", "c"]]
    by_modules = {**chain, "polyquant.c": {"polyquant.b.two"}}
    assert circles(by_modules) == [["polyquant.b.two", "polyquant.c"]]


def module_imports() -> dict[str, set[str]]:
    """Module of the core -> those of the core that it imports, in functions too; not those for type checkers alone."""
    paths = {".".join(path.relative_to(ROOT / "core").with_suffix("").parts): path for path in CORE}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items() if name.startswith("polyquant.")}

    def imported(node: ast.AST) -> set[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return set().union(*map(imported, node.orelse))
        if isinstance(node, ast.Import):
            return {alias.name for alias in node.names if alias.name in paths}
        if isinstance(node, ast.ImportFrom) and node.module in paths:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            return {name if name in paths else node.module for name in names}
        return set().union(*map(imported, ast.iter_child_nodes(node)))

    return {name: imported(ast.parse(path.read_text())) - {name} for name, path in paths.items()}


def rooms(modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports between rooms."""
    graph: dict[str, set[str]] = {}
    for name, imported in modules.items():
        if name != "polyquant":
            room = name.split(".")[1]
            others = {other.split(".")[1] for other in imported if other != "polyquant"}
            graph.setdefault(room, set()).update(others - {room})
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Names that reach each other, in groups."""

    def reached(start: str) -> set[str]:
        found, next_ones = set(), [start]
        while next_ones:
            for name in graph.get(next_ones.pop(), set()) - found:
                found.add(name)
                next_ones.append(name)
        return found

    reach = {name: reached(name) for name in graph}
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach[other])) for name in graph if name in reach[name]
    }
    return sorted(map(list, groups))


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


@pytest.mark.parametrize(
    "foreign",
    [r"/work/|/tmp/pq|/opt/wheels", r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.(org|com)"],
    ids=["paths", "registries"],
)
def test_files_speak_of_no_machine(foreign):
    """Neither of folders of the one they were written on, nor of hosts of package registries: pip knows where it looks."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if name != "tests/test_repository.py" and name.endswith((".py", ".md", ".toml", ".txt", ".yml", "run")):
            said = re.search(foreign, (ROOT / name).read_text(encoding="utf-8"))
            assert not said, f"{name} names {said[0]}"


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
                assert len(named) < 2, f"{path}:{node.lineno} lists {sorted(named)}"


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
    tracked = subprocess.run(
        ["git", "ls-files", "core/polyquant"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    data = {name.removeprefix("core/") for name in tracked.split() if not name.endswith(".py")}
    assert {"polyquant/py.typed", "polyquant/registry/catalogue.json"} <= data <= names


@pytest.mark.parametrize("package", ["polyquant", "polyquant.plugin", "polyquant.testing"])
def test_what_a_package_makes_public_is_in_its_list(package):
    """`__all__` has every name that the package's `__init__.py` defines or takes from polyquant, and no other."""
    path = ROOT / "core" / package.replace(".", "/") / "__init__.py"
    names, tree = set(), ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function) if node is not function}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
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
    assert not re.search(r"PIP_\w+=", (ROOT / ".ci" / "run").read_text())
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
