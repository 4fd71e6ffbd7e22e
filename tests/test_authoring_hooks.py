"""Every hook of a plugin broken in every plausible way: the message names the file, the hook and the cure.

Both for hooks that are written out as methods, and for those that a PluginBackend hands on to functions of its files.
And plugins of another age than the core: one that takes fewer arguments, one that asks for more.
"""

import ast
import textwrap
from pathlib import Path

import polyquant
import pytest
from polyquant import api
from polyquant.registry import hooks
from polyquant.contract import hookspecs
from polyquant.authoring.new import new_backend
from polyquant.errors import BackendFailed, BrokenBackend, PolyquantError, UnsupportedOperation
from polyquant.contract.hookspecs import QuantBackend
from polyquant.contract.markers import hookspec
from polyquant.plugin.backend import FILES
from polyquant.registry.answers import ITEMS
from polyquant.registry.registry import Registry
from polyquant.testing.catalog import ALL
from polyquant.testing.running import run_checks
from polyquant.testing.subject import Subject

from .installing import importable, take_out, write_metadata

SOURCE = Path("src", "polyquant_acme")
WRITTEN_OUT = '''"""The acme backend, its hooks written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polyquant.plugin import LoadedModel, convert, device_problems, hookimpl

class AcmeBackend:

    @hookimpl
    def backend_info(self):
        return INFO

    @hookimpl
    def validate_environment(self, device):
        return device_problems(device, INFO.capabilities)

    @hookimpl
    def build_config(self, options):
        return convert(AcmeOptions, options)

    @hookimpl
    def load(self, request, config):
        from polyquant_acme import _load
        return _load.load(request, config)

    @hookimpl
    def describe_layers(self, model):
        from polyquant_acme import _layers
        return _layers.describe_layers(model)

    @hookimpl
    def plan_layers(self, weights, config):
        from polyquant_acme import planning
        return planning.plan_layers(weights, config)

    @hookimpl
    def save(self, loaded, out):
        from polyquant_acme import _load
        return _load.save(loaded, out)

    @hookimpl
    def prepare_for_training(self, loaded):
        from polyquant_acme import _layers
        return _layers.prepare_for_training(loaded)

    @hookimpl
    def pack(self, module):
        from polyquant_acme import _layers
        return _layers.pack(module)

    @hookimpl
    def quantize_linear(self, linear, config):
        from polyquant_acme import _layers
        return _layers.quantize_linear(linear, config)

    @hookimpl
    def unpack(self, weight, config):
        from polyquant_acme import _layers
        return _layers.unpack(weight, config)


backend = AcmeBackend()
'''
IMPLEMENTED = [node.name for node in ast.walk(ast.parse(WRITTEN_OUT)) if isinstance(node, ast.FunctionDef)]
ARGUMENTS = {
    "backend_info": {},
    "validate_environment": {"device": "cpu"},
    "build_config": {"options": {}},
    "load": {"request": None, "config": None},
    "describe_layers": {"model": None},
    "plan_layers": {"weights": [], "config": None},
    "prepare_for_training": {"loaded": None},
    "save": {"loaded": None, "out": Path()},
    "pack": {"module": None},
    "quantize_linear": {"linear": None, "config": None},
    "unpack": {"weight": None, "config": None},
}
ANYTHING = ("prepare_for_training", "pack", "quantize_linear")
"""Hooks that may answer with any object: the model, a class that imports torch, a library's module."""
WAYS = {  # at the call
    "raises": "raise RuntimeError('broken')",
    "answers nothing": "pass",
    "answers with the wrong type": "return object()",
    "answers with a list of something else": "return [object()]",
}


@pytest.fixture
def acme(tmp_path):
    """The folder of the package of a backend acme, as new-backend writes it; it can be imported."""
    new_backend("acme", tmp_path / "acme")
    site = write_metadata(tmp_path / "site", "polyquant-acme", {"acme": "polyquant_acme.plugin:backend"}).parent
    with importable("polyquant_acme", site, tmp_path / "acme" / "src"):
        yield tmp_path / "acme" / SOURCE


@pytest.fixture
def package(acme):
    """acme with its hooks written out; a function that edits its plugin.py, and gives a registry."""
    file = acme / "plugin.py"
    card = file.read_text().partition("\nINFO = ")
    own = "\n".join(line for line in card[0].splitlines() if line.startswith("from polyquant"))
    info = f"INFO = {card[2].partition('# Replace: the optional hooks')[0]}"
    head, _, rest = WRITTEN_OUT.partition("\nclass ")
    file.write_text(f"{head}{own}\n\n{info}\n\nclass {rest}")

    def edit(change=None, text=None):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if change and isinstance(node, ast.FunctionDef):
                change(node)
        file.write_text(text or ast.unparse(tree))
        return Registry()

    edit.file = file
    return edit


def line_of(file, text):
    """Where a function stands; its first decorator counts."""
    tree = ast.parse(file.read_text())
    (node,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == text]
    return min(node.lineno, *(each.lineno for each in node.decorator_list)) if node.decorator_list else node.lineno


def use(registry, hook):
    if hook == "backend_info":
        return registry.info("acme")
    return registry.call("acme", hook, **ARGUMENTS[hook])


def test_every_hook_of_the_specification_but_one_is_broken_here_and_in_the_template(acme):
    template = Registry().plugin("acme")
    assert {hook for hook in (*hookspecs.REQUIRED, *hookspecs.OPTIONAL) if hasattr(template, hook)} == set(IMPLEMENTED)
    assert (
        set(IMPLEMENTED)
        == set(hookspecs.REQUIRED + hookspecs.OPTIONAL) - {"quantize", "write_unpacked"}
        == set(ARGUMENTS)
    )
    assert hooks.CURES.keys() == {*hookspecs.REQUIRED, *hookspecs.OPTIONAL}


@pytest.mark.parametrize(
    ("hook", "way"),
    [
        (hook, way)
        for hook in IMPLEMENTED
        for way in WAYS
        if (hook not in ANYTHING or "wrong" not in way) and (hook in ITEMS or "something else" not in way)
    ],
)
def test_a_hook_that_fails_when_it_is_called(package, hook, way):
    def change(node):
        if node.name == hook:
            node.body = ast.parse(WAYS[way]).body

    registry = package(change)
    with pytest.raises(BrokenBackend if way != "raises" or hook == "backend_info" else BackendFailed) as caught:
        use(registry, hook)
    message = str(caught.value)
    line = line_of(package.file, hook)
    if way == "raises":
        raised = next(n for n, text in enumerate(package.file.read_text().splitlines(), 1) if "RuntimeError" in text)
        assert f"failed in {hook}" in message or f"{hook} failed" in message
        assert f"RuntimeError: broken (polyquant_acme/plugin.py:{raised})" in message
        assert "mend it there, or tell the makers of polyquant-acme 1.0" in message or hooks.CURES[hook] in message
    else:
        found = {"answers nothing": "NoneType", "answers with the wrong type": "object"}.get(way, "object is in it")
        assert f"polyquant-acme 1.0: {hook} must answer with" in message
        assert found in message
        assert f"(polyquant_acme/plugin.py:{line}): {hooks.CURES[hook]}" in message


@pytest.mark.parametrize("hook", IMPLEMENTED)
def test_a_hook_that_is_misspelt(package, hook):
    def change(node):
        if node.name == hook:
            node.name = hook[:-2] + hook[-1] + hook[-2]

    registry = package(change)
    with pytest.raises(BrokenBackend) as caught:
        registry.info("acme")
    wrong = hook[:-2] + hook[-1] + hook[-2]
    place = f"polyquant_acme/plugin.py:{line_of(package.file, wrong)}"
    assert f"{place}: unknown hook {wrong!r}. Did you mean {hook!r}? Rename it, or take @hookimpl off" in str(
        caught.value
    )


@pytest.mark.parametrize("hook", IMPLEMENTED)
def test_a_hook_without_its_mark(package, hook):
    def change(node):
        if node.name == hook:
            node.decorator_list = []

    registry = package(change)
    with pytest.raises(BrokenBackend) as caught:
        registry.info("acme")
    line = line_of(package.file, hook)
    assert f"polyquant_acme/plugin.py:{line}: {hook} has no mark, so it is never called; put @hookimpl above it" in str(
        caught.value
    )


@pytest.mark.parametrize("hook", IMPLEMENTED)
def test_a_hook_that_is_missing(package, hook):
    tree = ast.parse(package.file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            node.body = [each for each in node.body if getattr(each, "name", "") != hook]
            place = f"polyquant_acme/plugin.py:{node.lineno}"
    registry = package(text=ast.unparse(tree))
    if hook in hookspecs.REQUIRED:
        with pytest.raises(BrokenBackend) as caught:
            registry.info("acme")
        number = next(n for n, text in enumerate(package.file.read_text().splitlines(), 1) if "class AcmeB" in text)
        arguments = ", ".join(("self", *ARGUMENTS[hook]))
        assert f"polyquant_acme/plugin.py:{number}: lacks the required hook {hook}." in str(caught.value), place
        assert f"Add it: @hookimpl def {hook}({arguments}); {hooks.CURES[hook]}" in str(caught.value)
    else:
        with pytest.raises(UnsupportedOperation, match=f"acme does not implement {hook}; installed backends that do"):
            use(registry, hook)


@pytest.mark.parametrize("hook", IMPLEMENTED)
def test_a_hook_that_asks_for_an_argument_that_is_not_given(package, hook):
    """As one written for a newer polyquant does."""

    def change(node):
        if node.name == hook:
            node.args.args.append(ast.arg("deadline"))

    registry = package(change)
    with pytest.raises(BrokenBackend) as caught:
        registry.info("acme")
    given = ", ".join(ARGUMENTS[hook]) or "nothing"
    place = f"polyquant_acme/plugin.py:{line_of(package.file, hook)}"
    assert f"{place}: {hook} asks for 'deadline', and hook specification 1 gives {given}." in str(caught.value)
    assert "Rename it or take it out; where a newer polyquant gives it, update polyquant" in str(caught.value)


# hooks that are functions of the package's files


def function_instead(acme, hook, body):
    """Let the file that answers `hook` end with a function of that name and this body; gives file and line."""
    file = acme / f"{FILES[hook]}.py"
    others = file.read_text().replace(f"def {hook}(", f"def _{hook}(")
    text = f"{others}\n\ndef {hook}({', '.join(ARGUMENTS[hook])}):\n    {body}\n"
    file.write_text(text)
    line = next(number for number, line in enumerate(text.splitlines(), 1) if line.startswith(f"def {hook}("))
    return f"polyquant_acme/{file.name}", line


FORWARDED = [hook for hook in IMPLEMENTED if hook in FILES]


@pytest.mark.parametrize(
    ("hook", "way"),
    [
        (hook, way)
        for hook in FORWARDED
        for way in WAYS
        if (hook not in ANYTHING or "wrong" not in way) and (hook in ITEMS or "something else" not in way)
    ],
)
def test_a_function_that_fails_when_it_is_called(acme, hook, way):
    file, line = function_instead(acme, hook, WAYS[way])
    with pytest.raises(BackendFailed if way == "raises" else BrokenBackend) as caught:
        use(Registry(), hook)
    if way == "raises":
        assert f"acme failed in {hook}: RuntimeError: broken ({file}:{line + 1}); mend it there" in str(caught.value)
    else:
        assert f"({file}:{line}): {hooks.CURES[hook]}" in str(caught.value)


@pytest.mark.parametrize("hook", FORWARDED)
def test_a_function_or_a_file_that_is_missing(acme, hook):
    file = acme / f"{FILES[hook]}.py"
    text = file.read_text()
    file.write_text(text.replace(f"def {hook}(", f"def _{hook}(").replace(f"    {hook},\n", ""))
    missing = f"{hook} is to be answered by a function of that name in polyquant_acme/{file.name}, and there is none"
    with pytest.raises(BrokenBackend, match=missing):
        use(Registry(), hook)
    take_out("polyquant_acme")
    file.unlink()
    if hook == "plan_layers":  # plugin.py imports it
        with pytest.raises(
            BrokenBackend, match=r"No module named 'polyquant_acme.planning' \(polyquant_acme/plugin.py"
        ):
            Registry().info("acme")
    else:
        with pytest.raises(BrokenBackend, match=missing):
            use(Registry(), hook)


def test_a_misspelt_hook_of_a_plugin_backend(acme):
    file = acme / "plugin.py"
    file.write_text(file.read_text().replace('"plan_layers"', '"plan_layer"'))
    with pytest.raises(
        BrokenBackend, match=r"unknown hook 'plan_layer'; there are load, .*Did you mean 'plan_layers'\?"
    ):
        Registry().info("acme")


def test_a_subclass_writes_out_what_differs(acme):
    file = acme / "plugin.py"
    head, _, last = file.read_text().rpartition("backend = PluginBackend")
    own = "class Own(PluginBackend):\n    def save(self, loaded, out):\n        return out\n"
    file.write_text(f"{head}{own}\n\nbackend = Own{last}")
    with pytest.raises(BrokenBackend, match=r"plugin.py:\d+: save has no mark, so it is never called"):
        Registry().info("acme")
    take_out("polyquant_acme")
    file.write_text(file.read_text().replace("    def save", "    @hookimpl\n    def save").replace(
        "import BackendInfo", "import hookimpl, BackendInfo"))  # fmt: skip
    registry = Registry()
    assert registry.call("acme", "save", loaded=None, out=acme) == acme
    assert registry.implements("acme", "plan_layers")


def test_faults_of_the_card_and_the_options_are_told_of_their_files(acme):
    plugin = Registry().plugin("acme")
    assert (
        hooks.defined_at(plugin.backend_info)
        == hooks.defined_at(plugin.validate_environment)
        == "polyquant_acme/plugin.py"
    )
    assert hooks.defined_at(plugin.build_config) == "polyquant_acme/options.py"


# several at once, and what cannot be imported


def test_several_faults_come_at_once(package):
    def change(node):
        if node.name in ("load", "save"):
            node.args.args[1].arg = "wish"

    with pytest.raises(BrokenBackend, match=r"(?s)\n  - .*load asks for 'wish'.*\n  - .*save asks for 'wish'"):
        package(change).info("acme")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("backend = AcmeBackend()", "", r"has no attribute 'backend' .*the entry point names polyquant_acme.plugin:backend; write backend = YourBackend\(\)"),
        ("backend = AcmeBackend()", "backend = AcmeBackend", r"plugin.py:\d+\), and must name an object; write backend = AcmeBackend\(\)"),
        ("from typing import Any", "import a_library_that_is_missing", r"'a_library_that_is_missing' \(polyquant_acme/plugin.py:6\): install a_library_that_is_missing; a library that only the hooks need"),
        ("from typing import Any", "from polyquant_acme import nowhere", r"cannot import name 'nowhere'.*\(polyquant_acme/plugin.py:6\): mend it there"),
        ("from typing import Any", "from typing import", r"SyntaxError: .* \(polyquant_acme/plugin.py:6\): mend it there"),
        ("saves=True", "saves=True, flies=True", r"TypeError: Unexpected keyword argument 'flies' \(polyquant_acme/plugin.py:\d+\)"),
    ],
    ids=["no object", "class", "missing library", "missing module", "syntax", "unknown capability"],
)  # fmt: skip
def test_a_plugin_that_cannot_be_imported(package, old, new, message):
    text = package.file.read_text()
    assert old in text
    registry = package(text=text.replace(old, new))
    with pytest.raises(BrokenBackend, match=message):
        registry.info("acme")


def test_doctor_has_a_row_for_a_backend_that_raises(package):
    def change(node):
        if node.name == "validate_environment":
            node.body = ast.parse("raise RuntimeError('broken')").body

    package(change)
    (row,) = api.doctor("acme", device="cpu")
    assert not row.runs
    assert (
        "acme failed in validate_environment: RuntimeError: broken (polyquant_acme/plugin.py:" in row.problems[0].what
    )
    assert row.problems[0].fix == "update or uninstall polyquant-acme 1.0, or set POLYQUANT_DISABLE=acme"


@pytest.mark.parametrize(
    ("hook", "way", "check"),
    [
        ("validate_environment", "raises", "no_device_is_a_problem"),
        ("validate_environment", "answers nothing", "environment_check_is_quiet"),
        ("build_config", "raises", "options_survive_conversion"),
        ("build_config", "answers with the wrong type", "unknown_options_are_refused"),
        ("load", "raises", "loads"),
        ("load", "answers nothing", "is_in_eval_mode"),
        ("describe_layers", "answers with a list of something else", "loads"),
        ("plan_layers", "raises", "plan_is_within_one_percent"),
        ("plan_layers", "answers nothing", "plan_is_within_one_percent"),
        ("save", "raises", "writes_no_pickle"),
        ("save", "answers with the wrong type", "saves_and_loads_back"),
        ("prepare_for_training", "raises", "adapters_train_on_the_frozen_base"),
        ("prepare_for_training", "answers nothing", "adapters_train_on_the_frozen_base"),
    ],
)
def test_a_check_names_file_hook_and_cure(package, tmp_path_factory, hook, way, check):
    def change(node):
        if node.name == hook:
            node.body = ast.parse(WAYS[way]).body

    package(change)
    subject = Subject("acme", tmp_path_factory.getbasetemp() / "hooks", floors=None)
    subject.folder.mkdir(exist_ok=True)
    without = {each.name for each in ALL} - {check}
    outcomes = list(run_checks(subject, without=without, models=("llama",)))
    assert {outcome.status for outcome in outcomes} == {"failed"}, outcomes
    assert {hook in outcome.cure.partition(": ")[0] for outcome in outcomes} == {True}, outcomes
    assert all(outcome.cure.startswith("polyquant_acme/plugin.py:") for outcome in outcomes)
    assert all(len(outcome.cure.partition(": ")[2]) > 10 for outcome in outcomes)


# another age


class Newer(QuantBackend):
    """A specification of later: `load` gives one more argument, and there is one more hook."""

    @hookspec(firstresult=True)
    def load(self, request, config, deadline):
        raise NotImplementedError

    @hookspec(firstresult=True)
    def export(self, loaded, out):
        raise NotImplementedError


def answer_with(node, hook, code):
    if node.name == hook:
        node.body = ast.parse(code).body


def test_an_old_plugin_works_with_a_newer_core(package):
    old = package(
        lambda node: answer_with(node, "load", "return LoadedModel(model=None, config=config, kernel='none')")
    )
    newer = Registry(Newer)
    config = newer.call("acme", "build_config", options={})
    loaded = newer.call("acme", "load", request=None, config=config, deadline=5)
    assert loaded.config is config
    assert not newer.implements("acme", "export")
    assert old.implements("acme", "save")


class Leaving(QuantBackend):
    """A specification in the release before `load` loses an argument."""

    @hookspec(firstresult=True, warn_on_impl_args={"request": DeprecationWarning("take it from config.request")})
    def load(self, request, config):
        raise NotImplementedError


def test_an_argument_that_is_going_to_leave_warns(package):
    with pytest.warns(DeprecationWarning, match=r"take it from config\.request"):
        assert Registry(Leaving).info("acme").name == "acme"


def test_a_plugin_may_take_fewer_arguments(package):
    def change(node):
        if node.name == "load":
            node.args.args = node.args.args[:1] + [ast.arg("config")]
            node.body = ast.parse("return LoadedModel(model=None, config=config, kernel='none')").body

    registry = package(change)
    assert registry.call("acme", "load", request="left out", config="given").config == "given"


def test_a_new_plugin_works_with_the_newer_core_and_an_old_one_names_what_it_lacks(package):
    def change(node):
        if node.name == "load":
            node.args.args.append(ast.arg("deadline"))
            node.body = ast.parse("return LoadedModel(model=None, config=config, kernel=str(deadline))").body

    old = package(change)
    assert Registry(Newer).call("acme", "load", request=None, config=None, deadline=5).kernel == "5"
    metadata = package.file.parents[3] / "site" / "polyquant_acme-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text() + "Requires-Dist: torch\nRequires-Dist: polyquant>=99.5\n")
    with pytest.raises(BrokenBackend) as caught:
        old.info("acme")
    assert "load asks for 'deadline', and hook specification 1 gives request, config" in str(caught.value)
    needed = f"It requires polyquant>=99.5, and polyquant {polyquant.__version__} is installed: pip install 'polyquant>=99.5'"
    assert needed in str(caught.value)


def test_an_argument_that_was_taken_out_says_what_to_use_instead(package, monkeypatch):
    monkeypatch.setattr(hookspecs, "REMOVED", {"load": {"device": "use request.device"}})

    def change(node):
        if node.name == "load":
            node.args.args.append(ast.arg("device"))

    with pytest.raises(
        BrokenBackend, match="load asks for 'device', which was taken out of the specification: use request.device"
    ):
        package(change).info("acme")


def test_a_hook_that_only_a_newer_core_has_may_be_marked_so(package):
    text = package.file.read_text()
    extra = textwrap.indent("\n@hookimpl(optionalhook=True)\ndef export(self, loaded, out):\n    return out\n", "    ")
    registry = package(text=text.replace("\n\nbackend = ", f"{extra}\n\nbackend = "))
    assert registry.info("acme").name == "acme"
    assert Registry(Newer).implements("acme", "export")
    take_out("polyquant_acme")
    unmarked = package(text=package.file.read_text().replace("(optionalhook=True)", ""))
    with pytest.raises(PolyquantError, match="unknown hook 'export'"):
        unmarked.info("acme")
