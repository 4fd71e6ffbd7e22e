"""Finding plugins: what is listed, what is refused, and how each refusal reads."""

import importlib.metadata
import re

from types import SimpleNamespace

import pytest
from polyquant.registry.backend import Backend
from polyquant.registry.catalogue import catalogue, maker_of, readers_of
from polyquant.errors import (
    BackendConflict,
    BackendFailed,
    BrokenBackend,
    ConfigError,
    UnknownBackend,
    UnsupportedOperation,
)
from polyquant.contract import hookspecs
from polyquant.registry.observers import ADDRESSED, Recorder
from polyquant.registry.registry import Registry
from polyquant.types import BackendInfo

from .conftest import GOOD_PLUGIN


def test_a_plugin_is_found_by_its_entry_point(make_plugin):
    make_plugin()
    registry = Registry()
    assert "acme" in registry.names()
    assert registry.origin("acme") == "polyquant-acme 1.0"
    assert isinstance(registry.info("acme"), BackendInfo)
    assert Backend("acme", registry).config({"bits": 8}).bits == 8


def test_names_are_listed_without_importing_the_plugin(make_plugin):
    make_plugin("raise RuntimeError('imported')")
    assert "acme" in Registry().names()


def test_an_unknown_backend_names_the_nearest(make_plugin):
    make_plugin()
    with pytest.raises(UnknownBackend, match=r"no backend 'acne'; installed: acme.*Did you mean 'acme'\?"):
        Registry().info("acne")


def test_two_distributions_of_one_name_are_both_named(make_plugin):
    make_plugin()
    make_plugin(distribution="polyquant-other", version="2.1")
    with pytest.raises(BackendConflict, match="'acme' is claimed by .*polyquant-other 2.1.*uninstall one") as caught:
        Registry().info("acme")
    assert "polyquant-acme 1.0" in str(caught.value)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("import a_library_that_is_missing", "polyquant-acme 1.0: import failed with ModuleNotFoundError"),
        ("raise SyntaxError('no')", "import failed with SyntaxError: no"),
        ("x = 1", "import failed with AttributeError.*backend"),
        (GOOD_PLUGIN.replace("def load(", "def lood("), "unknown hook 'lood'.*Did you mean 'load'"),
        (GOOD_PLUGIN.replace("    @hookimpl\n    def describe_layers(self, model):\n        return []\n", ""), "lacks the required hook.*describe_layers"),
        (GOOD_PLUGIN.replace("def load(self, request, config)", "def load(self, wish, config)"), "(?s)hooks do not fit.*wish"),
        (GOOD_PLUGIN.replace('name="acme"', 'name="other"'), "entry point 'acme' answers with the card of 'other'"),
        (GOOD_PLUGIN.replace("return BackendInfo(", "return dict("), "backend_info must answer with BackendInfo, it answered with dict"),
        (GOOD_PLUGIN.replace("return BackendInfo(", "raise KeyError('x')\n        return BackendInfo("), "backend_info failed with KeyError"),
    ],
    ids=["import", "syntax", "no object", "misspelt", "lacks a hook", "argument", "name", "type", "raises"],
)  # fmt: skip
def test_a_broken_plugin_is_an_error_only_when_used(make_plugin, broken, message):
    make_plugin(broken)
    make_plugin(GOOD_PLUGIN.replace('"acme"', '"good"'), backend="good", distribution="polyquant-good")
    registry = Registry()
    assert {"acme", "good"} <= set(registry.names())
    for _ in range(2):  # the second time from memory
        with pytest.raises(BrokenBackend, match=message):
            registry.info("acme")
    assert registry.call("good", "validate_environment", device="cpu") == []


def test_a_hook_that_answers_with_the_wrong_type_is_named(make_plugin):
    make_plugin(GOOD_PLUGIN.replace("return []", "return 'fine'", 1))
    with pytest.raises(BrokenBackend, match="polyquant-acme 1.0: validate_environment must answer with list"):
        Registry().call("acme", "validate_environment", device="cpu")


def test_a_hook_that_answers_nothing_is_named(make_plugin):
    make_plugin(GOOD_PLUGIN.replace("return LoadedModel(", "LoadedModel("))
    with pytest.raises(BrokenBackend, match="load must answer with LoadedModel, it answered with NoneType"):
        Registry().call("acme", "load", request=None, config=None)


def test_the_librarys_own_error_is_chained(make_plugin):
    make_plugin(GOOD_PLUGIN.replace("return LoadedModel(", "1 / 0\n        return LoadedModel("))
    with pytest.raises(BackendFailed, match="acme failed in load: ZeroDivisionError: division by zero") as caught:
        Registry().call("acme", "load", request=None, config=None)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_absent_optional_hook_names_the_backends_that_have_it(make_plugin):
    make_plugin()
    saver = GOOD_PLUGIN.replace('"acme"', '"saver"').replace(
        "backend = ", "    @hookimpl\n    def save(self, loaded, out):\n        return out\n\nbackend = "
    )
    make_plugin(saver, backend="saver", distribution="polyquant-saver")  # fmt: skip
    registry = Registry()
    with pytest.raises(UnsupportedOperation, match="acme does not implement save; installed backends that do:.*saver"):
        registry.require("acme", "save")


def test_only_the_addressee_is_called(make_plugin):
    make_plugin()
    hijacker = GOOD_PLUGIN.replace('"acme"', '"hijacker"').replace(
        "return convert(Options, options)", "raise AssertionError"
    )
    make_plugin(hijacker, backend="hijacker", distribution="polyquant-hijacker")
    registry = Registry()
    registry.info("hijacker")
    assert registry.call("acme", "build_config", options={}).bits == 4


def test_plugins_can_be_switched_off(make_plugin, monkeypatch):
    make_plugin()
    monkeypatch.setenv("POLYQUANT_DISABLE", "acme, other")
    assert "acme" not in Registry().names()


def test_observers_see_every_addressed_call(make_plugin):
    make_plugin()
    loaded = Backend("acme", Registry()).load(None, SimpleNamespace(options=None))
    (record,) = loaded.records
    assert (record.backend, record.hook, record.failed) == ("acme", "load", False)
    assert record.seconds > 0
    assert record.peak_bytes is None or record.peak_bytes > 10**6


def test_a_recorder_has_every_addressed_hook_and_tells_backends_apart(make_plugin):
    make_plugin()
    make_plugin(GOOD_PLUGIN.replace('"acme"', '"good"'), backend="good", distribution="polyquant-good")
    registry, everything, one = Registry(), Recorder(), Recorder("good")
    registry.add_observer(everything)
    registry.add_observer(one)
    for name in ("acme", "good"):
        for hook, arguments in (("validate_environment", {"device": "cpu"}), ("build_config", {"options": {}}),
                                ("describe_layers", {"model": None})):  # fmt: skip
            registry.call(name, hook, **arguments)
    with pytest.raises(ConfigError):
        registry.call("acme", "build_config", options={"bits": 5})
    assert [(record.backend, record.hook) for record in everything.records] == [
        (name, hook) for name in ("acme", "good") for hook in ("validate_environment", "build_config", "describe_layers")
    ] + [("acme", "build_config")]  # fmt: skip
    assert [record.failed for record in everything.records] == [False] * 6 + [True]
    assert {record.backend for record in one.records} == {"good"}
    assert set(ADDRESSED) == {*hookspecs.REQUIRED, *hookspecs.OPTIONAL} - {"backend_info"}
    assert all(callable(getattr(Recorder, hook)) for hook in ADDRESSED)


def test_a_trace_names_each_call_with_its_time(make_plugin, monkeypatch, capsys):
    make_plugin(GOOD_PLUGIN.replace("return LoadedModel(", "1 / 0\n        return LoadedModel("))
    for value, shown in (("1", True), ("0", False)):
        monkeypatch.setenv("POLYQUANT_TRACE", value)
        registry = Registry()
        registry.call("acme", "validate_environment", device="cpu")
        with pytest.raises(BackendFailed):
            registry.call("acme", "load", request=None, config=None)
        lines = capsys.readouterr().err.splitlines()
        assert bool(lines) == shown
        if shown:
            assert re.fullmatch(r"polyquant: acme validate_environment: \d\.\d{3} s on \w+", lines[0])
            assert re.fullmatch(r"polyquant: acme load: \d\.\d{3} s on \w+, failed", lines[1])


@pytest.mark.parametrize(
    ("asked", "installed", "words"),
    [
        ("autogptq", "gptq", r"gptq \(gptqmodel\) reads these checkpoints too: take that, or run: pip install polyquant-autogptq"),
        ("auto_gptq", "gptq", r"gptq \(gptqmodel\) reads these checkpoints too"),
        ("gptq", "autogptq", r"autogptq \(auto-gptq\) reads these checkpoints too: .* pip install polyquant-gptqmodel"),
        ("autogptq", "auto-round", r"auto-round \(auto-round\) reads these checkpoints too"),
        ("auto-round", "gptq", "Run: pip install polyquant-auto-round"),  # gptq reads one of its three
        ("llama.cpp", "gguf", r"gguf \(gguf\) reads these checkpoints too: .* pip install polyquant-llama-cpp"),
        ("awq", "autoawq", r"autoawq \(autoawq\) reads these checkpoints too"),
        ("auto-awq", "autoawq", "'auto-awq' is called 'autoawq' here"),
        ("autoawq", "acme", "Run: pip install polyquant-autoawq"),
        ("bnb", "acme", "Run: pip install polyquant-bitsandbytes"),
    ],
)  # fmt: skip
def test_legacy_names_lead_to_what_reads_the_same(make_plugin, monkeypatch, asked, installed, words):
    monkeypatch.setattr("polyquant.registry.registry.entry_points", lambda group: [
        point for point in importlib.metadata.entry_points(group=group) if point.dist.name == "polyquant-here"
    ])  # fmt: skip
    make_plugin(GOOD_PLUGIN.replace('"acme"', repr(installed)), backend=installed, distribution="polyquant-here")
    with pytest.raises(UnknownBackend, match=words):
        Registry().info(asked)


def test_the_catalogue_knows_who_reads_and_who_makes():
    assert readers_of("gptq") == ["gptq", "auto-round", "autogptq"], "its namesake first, what lives apart last"
    assert readers_of("gguf") == ["gguf", "llama-cpp"]
    assert readers_of("nothing of this kind") == []
    assert maker_of("gguf") == "gguf"


def test_every_quant_method_is_named_like_the_backend_that_a_hint_leads_to():
    for known in catalogue().values():
        for method in known.reads:
            reader = readers_of(method)[0]
            assert method in (reader, *catalogue()[reader].also_called)


def test_no_name_is_taken_twice():
    names = [name for backend, known in catalogue().items() for name in (backend, *known.also_called)]
    assert len(names) == len(set(names))
