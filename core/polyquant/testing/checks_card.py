"""Checks of the card, the hooks and the environment check: nothing is loaded."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import math
import os
from typing import Any, get_args

from polyquant.contract import hookspecs
from polyquant.isolated import handles
from polyquant.options import NumberFormat, RoundingMethod, describe_options
from polyquant.registry import cards
from polyquant.registry.catalogue import catalogue
from polyquant.registry.installed import registry
from polyquant.testing.check import check, expect
from polyquant.testing.processes import run_python
from polyquant.testing.subject import Subject
from polyquant.types import Problem

NO_DEVICES = ("nonsense", "", "cuda:999")
IMPORTED = """
import json, sys, polyquant
handle = polyquant.backend(sys.argv[1])
handle.config({})
from polyquant.registry.installed import registry
print(json.dumps([[name for name in sys.argv[2:] if name in sys.modules], registry().complaints(sys.argv[1])]))
"""


@check(per="backend")
def imports_nothing_heavy(subject: Subject) -> None:
    """Reading the card and checking options imports neither torch nor any library that the backend declares.

    Nor does it print, or take seconds: every command imports every plugin.
    """
    own = [library.module or library.distribution.replace("-", "_") for library in subject.info.libraries]
    heavy, complaints = run_python(IMPORTED, subject.backend, "torch", "transformers", *own)
    expect(not heavy, f"plugin.py or options.py imports {', '.join(heavy)}; import it inside the hooks, in _load.py")
    expect(not complaints, f"the plugin {' and '.join(complaints)}; let it only define things while it is imported")


@check(per="backend")
def card_is_complete(subject: Subject) -> None:
    """The card names what users read and query, and presets that are valid options; a card.json says the same."""
    from packaging.specifiers import SpecifierSet

    info, capabilities = subject.info, subject.capabilities
    expect(info.summary and "\n" not in info.summary, f"the summary must be one line, it is {info.summary!r}")
    expect(info.docs.startswith("https://"), f"docs must be an https address, it is {info.docs!r}")
    expect(info.presets, "the card has no presets; each names options that users can pick, the first is the default")
    expect(capabilities.bits and min(capabilities.bits) > 0, f"bits must be positive, they are {capabilities.bits}")
    expect(capabilities.schemes, "capabilities.schemes is empty")
    expect(capabilities.devices, "capabilities.devices is empty")
    expect(
        capabilities.on_the_fly or capabilities.loads_prequantized,
        "the backend loads nothing: it neither quantizes on the fly nor reads any quant_method",
    )
    if capabilities.makes_from != "dense":
        said = f"makes_from is {capabilities.makes_from!r}"
        expect(subject.handle.can("quantize"), f"{said}, and there is no quantize hook")
        expect(capabilities.makes_from in capabilities.loads_prequantized, f"{said}, which loads_prequantized has not")
    kinds = {support.type for support in capabilities.devices}
    unknown = sorted(set(info.compute_dtypes) - kinds)
    expect(not unknown, f"compute_dtypes names {', '.join(unknown)}, which capabilities.devices does not")
    silent = [option.name for option in describe_options(info.options) if not option.description]
    expect(not silent, f"options without a description: {', '.join(silent)}; give each msgspec.Meta(description=...)")
    for mark in info.marks:
        expect(mark.method in capabilities.loads_prequantized, f"a mark of {mark.method!r}, which it does not read")
        expect(mark.file or mark.headers or (mark.key and mark.fields), f"a mark of {mark.method!r} that marks nothing")
    for library in info.libraries:
        SpecifierSet(library.versions)
    for preset, options in info.presets.items():
        bits = subject.handle.config(options).weight_bits
        expect(bits in capabilities.bits, f"preset {preset} has {bits} bits, capabilities.bits is {capabilities.bits}")
    package = registry().package(info.name)
    home = cards.home_of(package)
    if home is not None and (home / cards.FILE).exists():
        due = cards.text(home, registry().package_cards(info.name)) == (home / cards.FILE).read_text(encoding="utf-8")
        expect(due, f"{package}/{cards.FILE} is not what the code says: run polyquant write-card {info.name}")


@check(per="backend")
def capabilities_have_their_hooks(subject: Subject) -> None:
    """What is declared is implemented, and what is implemented is declared."""
    for capability, hook in (("saves", "save"), ("trains", "prepare_for_training"), ("needs_calibration", "quantize")):
        declared, there = getattr(subject.capabilities, capability), subject.handle.can(hook)
        expect(not declared or there, f"{capability} is declared, and the hook {hook} is not implemented")
        if hook != "quantize":  # it may round to nearest, without calibration
            expect(declared or not there, f"the hook {hook} is implemented, and {capability} is not declared")


@check(per="backend")
def facts_are_of_known_kinds(subject: Subject) -> None:
    """What options declare of every preset is one of the words there are, and fits the rest of the card."""
    text = subject.handle.can("quantize") or not subject.capabilities.on_the_fly
    for preset, options in subject.info.presets.items():
        config = subject.handle.config(options)
        for name, words in (("rounding_method", get_args(RoundingMethod)), ("number_format", get_args(NumberFormat))):
            expect(
                (found := getattr(config, name)) in words,
                f"{preset}: {name} must be one of {', '.join(words)}, it is {found!r}",
            )
        expect(
            0 < config.level_bits <= config.weight_bits,
            f"{preset}: level_bits is {config.level_bits:g} of {config.weight_bits:g} weight_bits",
        )
        needs_text = config.rounding_method in ("calibrated", "tuned")
        expect(
            text or not needs_text,
            f"{preset}: rounding_method is {config.rounding_method}, and the backend quantizes while loading, without "
            "text: implement quantize, or say how it rounds",
        )
        expect(
            needs_text or not subject.capabilities.needs_calibration,
            f"{preset}: needs_calibration is declared, and rounding_method is {config.rounding_method!r}; override it",
        )


@check(per="backend")
def measured_figures_are_of_presets(subject: Subject) -> None:
    """measured_kl names presets of the card, with divergences above zero."""
    info = subject.info
    unknown = sorted(set(info.measured_kl) - set(info.presets))
    expect(not unknown, f"measured_kl names {', '.join(unknown)}, and the presets are {', '.join(info.presets)}")
    wrong = [preset for preset, kl in info.measured_kl.items() if not 0 < kl < math.inf]
    expect(not wrong, f"measured_kl of {', '.join(wrong)} is no divergence in nats above zero")


@check(per="backend")
def names_are_its_own(subject: Subject) -> None:
    """also_called is nobody else's name: neither of an installed backend nor of one that polyquant knows."""
    info = subject.info
    others = {other.name: {other.name, *other.also_called} for other in handles.backends() if other.name != info.name}
    for name, known in catalogue().items():
        if name != info.name:
            others.setdefault(name, set()).update((name, *known.also_called))
    for name, names in others.items():
        shared = sorted(names & {info.name, *info.also_called})
        expect(not shared, f"{', '.join(shared)} is what {name} is called; take another name")
    expect(info.name not in info.also_called, f"also_called repeats the name {info.name!r}")


@check(per="backend")
def hooks_fit_the_specification(subject: Subject) -> None:
    """Every hook takes the specified arguments, without defaults (pluggy leaves those out), and is marked."""
    plugin = subject.handle.plugin
    for hook in (*hookspecs.REQUIRED, *hookspecs.OPTIONAL):
        method = getattr(plugin, hook, None)
        if method is None:
            continue
        expect(subject.handle.can(hook), f"{hook} is not marked with @hookimpl, so it is never called")
        parameters = inspect.signature(method).parameters.values()
        filled = [parameter.name for parameter in parameters if parameter.default is not parameter.empty]
        expect(not filled, f"{hook} has defaults for {', '.join(filled)}; pluggy never passes such an argument")


@check(per="backend")
def no_device_is_a_problem(subject: Subject) -> None:
    """A device that is not there gives problems with their fix; nothing is raised."""
    for device in NO_DEVICES:
        try:
            problems = subject.handle.problems_in_time(device)
        except Exception as error:
            expect(False, f"validate_environment({device!r}) raised {error!r}; return a Problem")
        expect(problems, f"validate_environment({device!r}) found no problem")
        _expect_readable(problems, device)


@check(per="backend")
def environment_check_is_quiet(subject: Subject) -> None:
    """Checking the environment prints nothing and changes nothing."""
    before, said = _surroundings(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for support in subject.capabilities.devices:
            _expect_readable(subject.handle.problems_in_time(support.type), support.type)
    expect(not said.getvalue(), f"validate_environment prints: {said.getvalue()[:200]!r}")
    changed = [name for name, value in _surroundings().items() if value != before[name]]
    expect(not changed, f"validate_environment changes {', '.join(changed)}")


def _expect_readable(problems: list[Problem], device: str) -> None:
    for problem in problems:
        expect(isinstance(problem, Problem), f"validate_environment({device!r}) gave {problem!r}, not a Problem")
        expect(problem.what and problem.fix, f"a problem must say what is wrong and the fix: {problem}")


def _surroundings() -> dict[str, Any]:
    return {"os.environ": dict(os.environ), "the logging level": (logging.root.level, logging.root.manager.disable)}
