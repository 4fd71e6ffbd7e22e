"""What the README and the docs show is run, and what they show of the output is there."""

import ast
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import polyquant
import polyquant.testing
import pytest
import typer
from polyquant.authoring.new import new_backend
from polyquant.contract import hookspecs
from polyquant.cli.build import build
from polyquant.registry.catalogue import catalogue
from polyquant.cli.main import backend_named_in
from polyquant.loading.options import LoadOptions
from polyquant.options import describe_options
from polyquant.registry.registry import Registry
from polyquant.testing import warm

from .installing import importable, write_metadata
from .snippets import NOT_RUN, PAGES, READMES, ROOT, SHOWN, blocks, commands, reason_not_to_run

REAL = ("README.md", "docs/tutorial/index.md")  # they name the real model, and show what it answers
BROUGHT = {
    path.parent.name: list(tomllib.loads(path.read_text())["project"]["entry-points"]["polyquant.backends"])
    for path in ROOT.glob("plugins/*/pyproject.toml")
}
"""folder of a plugin -> the backends that it brings."""
MISSING = re.compile(r"[Mm]issing|does not exist|is required")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def runs(path: Path) -> bool:
    """Whether a page has a block to run. The README's second Python block is a sketch of a plugin."""
    parts = [(language, command) for language, text in blocks(path) if language in ("sh", "console")
             for command, _ in commands(language, text)]  # fmt: skip
    return any(not reason_not_to_run(path, command) for _, command in parts) or any(
        language == "python" for language, _ in blocks(path)
    )


RUN = [path for path in PAGES if runs(path) and name(path) not in REAL]


def run_page(path: Path, folder: Path, **variables: str) -> None:
    (folder / "page").mkdir()
    words = [warm.interpreter(), str(ROOT / "tests" / "snippets.py"), str(path), str(folder / "page")]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", RUN, ids=name)
def test_a_page_shows_what_happens(path, tmp_path):
    run_page(path, tmp_path, POLYQUANT_CACHE=str(tmp_path / "cache"))


@pytest.mark.real
def test_the_tutorial_shows_what_happens(tmp_path):
    path = ROOT / "docs" / "tutorial" / "index.md"
    assert len([1 for language, _ in blocks(path) if language == "console"]) == 7
    run_page(path, tmp_path)


@pytest.mark.real
def test_the_readmes_ten_lines_run(tmp_path):
    code, _ = [text for language, text in blocks(ROOT / "README.md") if language == "python"]
    assert len(code.splitlines()) <= 11
    result = warm.run(["-c", code], seconds=300, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "True 1" in result.stdout, "the report must have passed"
    assert (tmp_path / "smollm2-nf4" / "model.safetensors").exists()


PLUGINS_SHOWN = [
    (path, text)
    for path in (ROOT / "README.md", ROOT / "docs" / "authors" / "index.md")
    for language, text in blocks(path)
    if language == "python" and "PluginBackend(" in text
]


@pytest.mark.parametrize(("path", "code"), PLUGINS_SHOWN, ids=[name(path) for path, _ in PLUGINS_SHOWN])
def test_the_plugin_that_is_shown_is_one(path, code, tmp_path):
    """Beside the files that `polyquant new-backend acme` writes, its hooks fit and its card is answered."""
    new_backend("acme", tmp_path / "acme")
    (tmp_path / "acme" / "src" / "polyquant_acme" / "plugin.py").write_text(code)
    site = write_metadata(tmp_path / "site", "polyquant-acme", {"acme": "polyquant_acme.plugin:backend"}).parent
    assert len(code.splitlines()) <= (12 if path.name == "README.md" else 20)
    with importable("polyquant_acme", site, tmp_path / "acme" / "src"):
        registry = Registry()
        assert registry.info("acme").capabilities.saves
        assert registry.implements("acme", "save")
        (missing,) = registry.call("acme", "validate_environment", device="cpu")
        assert "acme is not installed" in missing.what
        assert registry.call("acme", "build_config", options={}).bits == 8


def test_both_pages_show_a_plugin():
    assert [name(path) for path, _ in PLUGINS_SHOWN] == ["README.md", "docs/authors/index.md"]


@pytest.mark.real
def test_the_readmes_commands_run(tmp_path):
    page = tmp_path / "README.md"  # without its Python, which the test above runs
    page.write_text(re.sub(r"^```python\n.*?^```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.M))
    run_page(page, tmp_path)


def test_what_is_not_run_is_there():
    for page, start in NOT_RUN:
        path = ROOT / page if page == "README.md" else ROOT / "docs" / page
        found = [command for language, text in blocks(path) for command, _ in commands(language, text)]
        assert any(command.startswith(start) for command in found), f"{page} no longer has {start!r}"


@pytest.mark.parametrize("path", [*PAGES, *READMES], ids=name)
def test_every_block_says_what_it_is(path):
    fences = re.findall(r"^```(.*)$", path.read_text(), re.MULTILINE)
    assert all(fences[::2]), "a block without a language is neither run nor shown on purpose"
    for language, text in blocks(path):
        assert language in ("python", "sh", "console", *SHOWN), language
        if language == "python":
            ast.parse(text)


def test_every_command_named_anywhere_is_one():
    """Also in a line of text, and where it cannot run: commands and options exist."""
    seen = 0
    for path in [*PAGES, *READMES]:
        text = path.read_text()
        inline = re.findall(r"`(polyquant [a-z][^`]*)`", text.replace("\n", " "))
        fenced = [command for language, block in blocks(path) if language in ("sh", "console")
                  for command, _ in commands(language, block) if command.startswith("polyquant ")]  # fmt: skip
        for command in inline + fenced:
            wrong = wrong_with(command)
            assert not wrong, f"{name(path)}: {command}: {wrong}"
            seen += 1
    assert seen > 60


def wrong_with(command: str) -> str:
    """What the command line would refuse of a command; something left out is not wrong."""
    words = shlex.split(re.split(r" [|<>] ?| > ", command)[0], comments=True)[1:]
    words = [word for word in words if word not in ("...", "…")]
    backend = backend_named_in(words)
    known = backend if backend in polyquant.backends().names else None
    root = typer.main.get_command(build(known, words[0] if words else ""))
    if not words:
        return ""
    try:
        context = root.make_context("polyquant", list(words[:1]))
        _, found, rest = root.resolve_command(context, words)
        found.make_context(words[0], rest, parent=context)
    except Exception as error:  # typer's own click, or click: by name
        if type(error).__name__ in ("Exit", "MissingParameter"):
            return ""
        message = error.format_message() if hasattr(error, "format_message") else f"{type(error).__name__}: {error}"
        return "" if MISSING.search(message) else message
    return ""


PROSE = {"adds", "backend", "gives", "has", "knows", "needs"}
"""What follows the word polyquant in messages that name no command."""


def test_every_command_named_in_a_message_is_one():
    """In what the core and the plugins say: the command is there, and each option that is written out."""
    seen = 0
    for path in [*ROOT.glob("core/polyquant/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")]:
        for words in commands_in(path):
            if words[0] not in PROSE:
                wrong = wrong_in_a_message(words)
                assert not wrong, f"{name(path)}: polyquant {' '.join(words)}: {wrong}"
                seen += 1
    assert seen > 10


def test_a_message_that_names_no_command_is_found(tmp_path):
    path = tmp_path / "planning.py"
    path.write_text("def f(x):\n    raise ValueError(f'leave it out; polyquant list shows {x}')\n")
    assert [wrong_in_a_message(words) for words in commands_in(path)] == ["there is no command 'list'"]
    assert wrong_in_a_message(["env", "destroy"]) == "there is no command 'env destroy'"
    assert wrong_in_a_message(["verify", "…", "--bakcend", "…"]) == "verify has no option --bakcend"
    assert not wrong_in_a_message(["quantize", "…", "--backend", "gguf", "--type", "Q8_0"])


def wrong_in_a_message(words: list[str]) -> str:
    """What is wrong with a command in a message, which may go on with other words."""
    backend = backend_named_in(words)
    known = backend if backend in polyquant.backends().names else None
    command = typer.main.get_command(build(known, words[0] if words else None))
    for count in (1, 2):
        if not hasattr(command, "commands"):
            break
        if words[count - 1 : count] and words[count - 1] not in command.commands:
            return f"there is no command {' '.join(words[:count])!r}"
        command = command.commands[words[count - 1]] if words[count - 1 : count] else command
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if re.fullmatch(r"--[a-z][a-z-]*", word) and word not in {*options, "--help"}]
    return f"{command.name} has no option {unknown[0]}" if unknown else ""


def commands_in(path: Path) -> Iterator[list[str]]:
    """The words after each `polyquant` in the strings of a file; what is filled in stands as …. Docstrings count where
    they have a command in backquotes."""
    tree = ast.parse(path.read_text())
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node) is not None
    }
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            text = node.value
        else:
            continue
        before = "`" if id(node) in docstrings else r"(?<![\w./-])"
        for found in re.findall(before + r"polyquant ([a-z][a-z-]*(?![\w.])[^`'\"\n;:,()|]*)", text):
            yield found.split()


def test_every_public_name_and_hook_has_its_place():
    python, hooks, authors = ((ROOT / "docs" / page).read_text() for page in
                              ("reference/python.md", "reference/hooks.md", "authors/index.md"))  # fmt: skip
    for public in (*polyquant.__all__, *polyquant.testing.__all__):
        assert re.search(rf"^::: polyquant[\w.]*\.{public}$", python, re.MULTILINE), public
    for public in polyquant.testing.__all__:
        assert f"`{public}`" in authors, public
    for hook in (*hookspecs.REQUIRED, *hookspecs.OPTIONAL):
        assert f"[`{hook}`]" in hooks and f"`{hook}(" in authors, hook


def test_every_installed_backend_has_a_page_with_every_option():
    for info in polyquant.backends():
        page = ROOT / "docs" / "backends" / f"{info.name}.md"
        if info.name in catalogue():
            text = page.read_text()
            for option in describe_options(info.options):
                assert f"| `{option.name}` |" in text and option.description.replace("|", "\\|") in text, option.name


def test_the_site_has_every_page():
    nav = (ROOT / "docs" / "site" / "mkdocs.yml").read_text()
    for path in PAGES:
        page = name(path).removeprefix("docs/")
        assert page in nav or page.startswith("backends/") or page == "README.md", page


CALLED = re.compile(r"polyquant\.(load|quantize)\(")


@pytest.mark.parametrize("path", [path for path in READMES if CALLED.search(path.read_text())], ids=name)
def test_calls_in_the_readmes_of_plugins_have_real_options(path):
    """Their models lie on the hub, or are the reader's: not run here, but the options are checked as a load would."""
    checked = 0
    for code in [text for language, text in blocks(path) if language == "python"]:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("polyquant.load", "polyquant.quantize"):
                named = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
                shared = {"revision", "calibration", "overwrite", *LoadOptions.__struct_fields__}
                backend = named.pop("backend", BROUGHT[path.parent.name][0])
                if len(node.args) > 1:
                    backend = ast.literal_eval(node.args[1])
                polyquant.backend(backend).config({key: value for key, value in named.items() if key not in shared})
                checked += 1
    assert checked, "no call of polyquant.load or polyquant.quantize stands there"


PUBLISHED = {
    "smollm2-135m": 0.135, "smollm2-1.7b": 1.71, "qwen2.5-0.5b": 0.494, "qwen2.5-7b": 7.62, "qwen3-0.6b": 0.596,
    "qwen3-4b": 4.02, "qwen3-8b": 8.19, "qwen3-14b": 14.8, "qwen3-32b": 32.8, "qwen3-30b-a3b": 30.5,
    "llama-2-7b": 6.74, "llama-3-8b": 8.03, "llama-3-70b": 70.6, "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21,
    "mistral-7b-v0.3": 7.25, "mistral-nemo-12b": 12.2, "mistral-small-24b": 23.6, "mixtral-8x7b": 46.7,
    "gemma-2-9b": 9.24, "gemma-2-27b": 27.2, "phi-3-mini-4k": 3.82, "phi-4": 14.7, "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 117, "deepseek-v3": 671,
}  # fmt: skip
"""Parameters as their makers give them, in billions, tied ones once."""
SIZES = json.loads((ROOT / "docs" / "reference" / "sizes.json").read_text())


def test_models_of_the_table_of_sizes_have_their_parameters():
    assert {name: float(f"{row['dense_bytes'] / 2e9:.3g}") for name, row in SIZES.items()} == PUBLISHED


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(name, marks=[] if name in ("smollm2-135m", "gpt-oss-20b") else pytest.mark.slow)
        for name in PUBLISHED
    ],
)
def test_the_table_of_sizes_is_what_is_planned(model, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")
    planned = importlib.import_module("sizes").sizes(model)
    for row in (planned, SIZES[model]):
        for candidate in row["candidates"].values():
            candidate["needed_bytes"] = pytest.approx(candidate["needed_bytes"], rel=0.05)  # transformers' activations
    assert planned == SIZES[model]


def test_the_page_of_machines_has_every_backend_where_its_card_puts_it():
    page = (ROOT / "docs" / "how-to" / "machine.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    nvidia = "".join(row for row in rows if row.startswith("| NVIDIA"))
    for info in polyquant.backends():
        if info.name in catalogue():
            kinds = {device.type for device in info.capabilities.devices}
            link = f"[{info.name}](../backends/{info.name}.md)"
            assert nvidia.count(link) == ("cuda" in kinds), info.name
            for kind, start in (("cpu", "| CPU"), ("xpu", "| Intel"), ("mps", "| Apple")):
                (row,) = (row for row in rows if row.startswith(start))
                assert (link in row) == (kind in kinds), f"{info.name}, {kind}"


CONFIGS = ("BitsAndBytesConfig", "GPTQConfig", "AwqConfig", "HqqConfig", "QuantoConfig", "TorchAoConfig")
MIGRATE = ROOT / "docs" / "how-to" / "migrate.md"


def section(path: Path, heading: str) -> str:
    """What stands under a heading of the second level."""
    return re.split(r"^## ", path.read_text().partition(f"\n## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_of_a_config_of_transformers_has_its_name_here(config):
    import transformers

    fields = set(inspect.signature(getattr(transformers, config)).parameters) - {"kwargs"}
    named = set(re.findall(r"`(\w+)(?:=[^`]*)?`", section(MIGRATE, config)))
    assert len(fields) > 2 and not fields - named


@pytest.mark.parametrize("config", CONFIGS)
def test_options_that_take_the_place_of_fields_are_there(config):
    backends = {"BitsAndBytesConfig": "bitsandbytes", "GPTQConfig": "gptq", "AwqConfig": "awq", "HqqConfig": "hqq",
                "QuantoConfig": "quanto", "TorchAoConfig": "torchao"}  # fmt: skip
    options = {option.name for option in describe_options(polyquant.backend(backends[config]).info.options)}
    shared = {*inspect.signature(polyquant.load).parameters, *inspect.signature(polyquant.quantize).parameters}
    rows = re.findall(r"^\| (.*) \| (.*) \|$", section(MIGRATE, config), re.MULTILINE)[1:]
    for old, new in rows:
        named = old if "the same" in new else new
        names = {name for name in re.findall(r"(?:`|, )(\w+)(?:=[^`,]*)?(?=[`,])", named)}
        assert names or new.startswith("none") or "`loaded." in new, new
        assert names <= options | shared, new


def test_messages_of_other_libraries_are_theirs():
    """Each heading stands in the file that is named first under it, as Python joins its strings."""
    page = ROOT / "docs" / "reference" / "messages.md"
    found = re.findall(r"^## (.+)\n\n`([\w/]+\.py)`", page.read_text(), re.MULTILINE)
    assert len(found) > 14
    for heading, file in found:
        package, _, rest = file.partition("/")
        source = Path(importlib.util.find_spec(package).origin).parent / rest
        strings = [node.value for node in ast.walk(ast.parse(source.read_text()))
                   if isinstance(node, ast.Constant) and isinstance(node.value, str)]  # fmt: skip
        assert any(heading in " ".join(text.replace("`", "").split()) for text in strings), f"{file}: {heading}"


@pytest.mark.slow
def test_examples_in_docstrings_run(tmp_path):
    """The `>>>` lines of the public functions, on the tiny model."""
    lines = []
    for each in polyquant.__all__:
        text = inspect.getdoc(getattr(polyquant, each)) or ""
        lines += [line.removeprefix(">>> ") for line in text.splitlines() if line.startswith(">>> ")]
    assert len(lines) >= 7
    page = tmp_path / "docstrings.md"
    page.write_text("```python\nimport polyquant\n" + "\n".join(lines) + "\n```\n")
    run_page(page, tmp_path, POLYQUANT_CACHE=str(tmp_path / "cache"))


def steps() -> list[tuple[str, str]]:
    """(function, file) in the order of the architecture page's list."""
    page = ROOT / "docs" / "explanation" / "architecture.md"
    text = page.read_text().partition("## Where a byte")[2].partition("\n## ")[0]
    found = re.findall(r"^\d+\. \[`(\w+)`\]\(([^)]+)\)", text, re.MULTILINE)
    return [(function, (page.parent / link).resolve().relative_to(ROOT).as_posix()) for function, link in found]


def test_the_way_of_a_byte_has_ten_steps_that_exist():
    assert len(steps()) == 10
    for function, path in steps():
        defined = {
            node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert function in defined, f"{path} has no {function}"


def test_a_byte_goes_that_way(tmp_path, run_python):
    code = f"""
import json, sys, threading
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests")!r})
from polyquant.testing.models import tiny_model
model = tiny_model("llama", Path({str(tmp_path)!r}))
calls = []
def watch(frame, event, argument):
    if event == "call" and "polyquant" in frame.f_code.co_filename:
        calls.append((frame.f_code.co_name, frame.f_code.co_filename))
threading.setprofile(watch)
sys.setprofile(watch)
from polyquant.cli.main import main
sys.argv = ["polyquant", "run", str(model), "--backend", "bitsandbytes", "--max-new-tokens", "1", "Hello"]
try:
    main()
except SystemExit:
    pass
sys.setprofile(None)
print()
print(json.dumps(list(dict.fromkeys(calls))))
"""
    done = run_python(code=code)
    assert done.returncode == 0, done.stderr
    called = [(function, path.removeprefix(f"{ROOT}/")) for function, path in json.loads(done.stdout.splitlines()[-1])]
    order = [called.index(step) for step in steps()]
    assert order == sorted(order), [called[index] for index in order]
