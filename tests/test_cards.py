"""Cards in files: listing reads them and imports no plugin; what does not fit the code beside it is not believed."""

import os
import sys

import msgspec
import pytest
from polyquant.authoring.new import new_backend
from polyquant.errors import BrokenBackend
from polyquant.registry.cards import FILE, as_json, checksum, text
from polyquant.registry.registry import Registry
from polyquant.testing.check import CheckFailed
from polyquant.testing.checks_card import card_is_complete
from polyquant.testing.subject import Subject

from .installing import importable, take_out, write_metadata


@pytest.fixture
def home(tmp_path):
    """The folder of the reference backend's code, with its file of cards, in a package that is installed."""
    new_backend("rowwise", tmp_path / "own")
    source, site = tmp_path / "own" / "src", tmp_path / "site"
    write_metadata(site, "polyquant-rowwise", {"rowwise": "polyquant_rowwise.plugin:backend"})
    with importable("polyquant_rowwise", site, source):
        folder = source / "polyquant_rowwise"
        write(folder)
        take_out("polyquant_rowwise")
        yield folder


def write(folder):
    (folder / FILE).write_text(text(folder, Registry().package_cards("rowwise")))


def imported():
    return [name for name in sys.modules if name.startswith("polyquant_rowwise")]


def test_a_card_is_read_without_its_plugin_until_the_options_are_asked_for(home):
    registry = Registry()
    card = registry.info("rowwise")
    assert card.capabilities.saves and card.presets
    assert registry.implements("rowwise", "save") and registry.implements("rowwise", "load")
    assert not registry.implements("rowwise", "quantize")
    assert imported() == []
    assert card.options.__name__ == "RowwiseOptions"
    assert "polyquant_rowwise.plugin" in imported()
    own = registry.plugin("rowwise").backend_info()
    assert registry.info("rowwise") is own
    assert plain(card) == plain(own)


def plain(card):
    return msgspec.json.decode(msgspec.json.encode(card, enc_hook=as_json))


@pytest.mark.parametrize("hook", ["build_config", "validate_environment"])
def test_a_hook_imports_the_plugin(home, hook):
    registry = Registry()
    arguments = {"options": {}} if hook == "build_config" else {"device": "cpu"}
    assert registry.call("rowwise", hook, **arguments) is not None
    assert "polyquant_rowwise.plugin" in imported()


def _changed(home):
    plugin = home / "plugin.py"
    plugin.write_text(plugin.read_text() + "\n")


def _moved(home):
    (home / "planning.py").rename(home / "formats.py")


def _of_another(home):
    file = home / FILE
    file.write_text(file.read_text().replace(f'"polyquant": "{_version(file)}"', '"polyquant": "0.0.1"'))


def _version(file):
    return msgspec.json.decode(file.read_bytes())["polyquant"]


def _cut_short(home):
    (home / FILE).write_bytes((home / FILE).read_bytes()[:-100])


def _of_others(home):
    (home / FILE).write_text((home / FILE).read_text().replace('"rowwise": {', '"others": {'))


def _incomplete(home):
    (home / FILE).write_text((home / FILE).read_text().replace('"summary"', '"sumary"'))


@pytest.mark.parametrize("change", [_changed, _of_another, _cut_short, _of_others, _incomplete])
def test_the_code_is_asked_where_the_file_is_not_of_it(home, change):
    said = Registry().info("rowwise").summary
    assert imported() == []
    change(home)
    assert Registry().info("rowwise").summary == said
    assert "polyquant_rowwise.plugin" in imported()


def test_what_imports_torch_says_nothing_of_a_card(home):
    """Files whose names begin with an underscore may change; any other, and its name, count."""
    before = checksum(home)
    (home / "_load.py").write_text("broken")
    assert checksum(home) == before
    _moved(home)
    assert checksum(home) != before


def test_a_plugin_behind_a_card_may_turn_out_broken(home, monkeypatch):
    registry = Registry()
    card = registry.info("rowwise")
    monkeypatch.setitem(sys.modules, "polyquant_rowwise.options", None)
    with pytest.raises(BrokenBackend, match="polyquant-rowwise 1.0: import failed"):
        _ = card.options
    with pytest.raises(BrokenBackend, match="import failed"):
        registry.info("rowwise")


def test_the_command_writes_it_and_the_suite_holds_it_to_the_code(home, run_python, tmp_path):
    subject = Subject("rowwise", tmp_path)
    card_is_complete(subject)
    _changed(home)
    with pytest.raises(CheckFailed, match="run polyquant write-card rowwise"):
        card_is_complete(subject)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    said = run_python("write-card", "rowwise", env={**os.environ, "PYTHONPATH": path})
    assert said.stdout == f"wrote {home / FILE}\n", said.stderr
    card_is_complete(subject)


def test_a_plugin_of_one_file_has_no_place_for_it(make_plugin, run_python):
    make_plugin()
    path = os.pathsep.join(entry for entry in sys.path if entry)
    said = run_python("write-card", "acme", env={**os.environ, "PYTHONPATH": path})
    assert said.returncode and "acme is a single file" in said.stderr
