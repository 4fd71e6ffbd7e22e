"""The conformance suite itself: a good backend passes, and each check finds the one backend that breaks its promise."""

import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import polyquant
import pytest
import torch
from polyquant.authoring.new import TEMPLATE
from polyquant.measure.quality.divergence import kl_divergence, top1_agreement
from polyquant.testing import keeping, warm
from polyquant.testing.catalog import ALL, cases
from polyquant.testing.check import FIRST, Floor
from polyquant.testing.models import ARCHITECTURES, tiny_model
from polyquant.testing.running import run_checks
from polyquant.testing.subject import Subject

sys.path[:0] = [str(Path(__file__).parent / "thirdparty"), str(TEMPLATE / "src")]

import rowwise_mutants  # noqa: E402

from .installing import write_metadata  # noqa: E402

TINY_FLOOR = {"int8": Floor(kl=0.003, top1=0.9)}  # measured on the tiny llama: 0.0014, 0.956
FRESH_PROCESS = {"load_leaves_global_state_alone", "wrong_tensors_are_refused"}
"""Checks that start a process, which takes seconds: only for the mutants that break them."""


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory):
    """The reference backend, its mutants and variants, installed as far as importlib can tell; one thread."""
    folder, threads = tmp_path_factory.mktemp("site"), torch.get_num_threads()
    write_metadata(folder, "polyquant-rowwise", {"rowwise": "polyquant_rowwise.plugin:backend"})
    write_metadata(folder, "polyquant-rowwise-mutants", rowwise_mutants.PLUGINS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        polyquant.registry.installed.registry.cache_clear()
        torch.set_num_threads(1)
        yield folder
    torch.set_num_threads(threads)
    polyquant.registry.installed.registry.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("conformance")


@pytest.fixture(scope="module")
def make_subject(folder):
    """A subject whose real model is a tiny one, so that a mutant is through in seconds."""

    def make(backend, **more):
        return Subject(backend, folder, floors=TINY_FLOOR, real_model=str(tiny_model("llama", folder / "tiny")), **more)

    return make


@pytest.mark.parametrize("backend", rowwise_mutants.BREAKS)
def test_a_mutant_fails_exactly_the_check_it_breaks(make_subject, monkeypatch, backend):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    broken = rowwise_mutants.BREAKS[backend]
    if broken == "offloads_to_the_cpu" and not torch.cuda.is_available():
        pytest.skip("nothing is offloaded from a CPU")
    outcomes = list(run_checks(make_subject(backend), without=FRESH_PROCESS - {broken}, models=("llama",)))
    failures = {outcome.check: outcome.reason for outcome in outcomes if outcome.status == "failed"}
    assert failures.keys() == {broken}, failures


def test_every_check_has_its_mutant():
    assert Counter(rowwise_mutants.BREAKS.values()) == Counter(each.name for each in ALL)
    assert all(each.summary.endswith(".") for each in ALL)


UNPACKED = {"packed_weights_are_the_librarys", "packed_layers_train", "packed_models_save_what_the_library_does",
            "converted_layers_are_the_same"}  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "absent"),
    [
        ("rowwise-calibrated", {"skipped_modules_stay_dense", "a_skip_pattern_without_a_match_is_refused"}),
        ("rowwise-reader", {"skipped_modules_stay_dense", "a_skip_pattern_without_a_match_is_refused"}),
        ("rowwise-runtime", {"is_in_eval_mode", "describes_every_tensor_once", "described_bytes_are_stored_bytes",
                             "memory_comes_back", "adapters_train_on_the_frozen_base", "a_second_adapter_trains",
                             "adapters_merge_or_are_refused", "dora_trains_or_is_refused"}),
    ],
)  # fmt: skip
def test_a_backend_is_asked_only_for_what_it_declares(make_subject, backend, absent):
    def make_checkpoint(dense, preset, out):
        return polyquant.load(dense, "rowwise", device="cpu").save(out)

    more = {"make_checkpoint": make_checkpoint} if backend == "rowwise-reader" else {}
    outcomes = list(run_checks(make_subject(backend, **more), without=FRESH_PROCESS, models=("llama",)))
    assert {outcome.check: outcome.reason for outcome in outcomes if outcome.status == "failed"} == {}
    skipped = {outcome.check: outcome.reason for outcome in outcomes if outcome.status == "not applicable"}
    assert skipped.keys() == absent | UNPACKED | {"compiles_with_torch", "offloads_to_the_cpu"}
    assert all("does not declare" in reason for reason in skipped.values())


def test_a_backend_that_cannot_make_a_checkpoint_is_told_to_provide_one(make_subject):
    every = {each.name for each in ALL} - {"loads"}
    (outcome,) = run_checks(make_subject("rowwise-reader"), without=every, models=("qwen2",))
    assert (outcome.status, outcome.case) == ("failed", "int8-qwen2")
    assert "override make_checkpoint" in outcome.reason


def test_unusual_models_may_be_refused_with_a_reason(make_subject):
    every = {each.name for each in ALL} - {"loads"}
    outcomes = {outcome.case: outcome for outcome in run_checks(make_subject("rowwise-picky"), without=every)}
    assert len(outcomes) == len(ARCHITECTURES)
    assert {case for case, outcome in outcomes.items() if outcome.status != "passed"} == {"int8-odd"}
    assert "hidden_size must be a multiple of 64" in outcomes["int8-odd"].reason


@pytest.fixture(scope="module")
def run_pytest(site, tmp_path_factory):
    """Run test classes in a pytest of their own; gives the outcome of each test, and everything it printed."""

    def run(*arguments, code=""):
        folder = tmp_path_factory.mktemp("project")
        if code:
            header = "from polyquant.testing import BackendConformance, Floor\n"
            (folder / "test_own.py").write_text(header + textwrap.dedent(code))
        path = os.pathsep.join(entry for entry in sys.path if entry)
        command = [
            warm.interpreter(),
            "-m",
            "pytest",
            "-rA",
            "-q",
            "-c",
            os.devnull,
            "--rootdir",
            folder,
            "-p",
            "no:cacheprovider",
        ]
        result = subprocess.run(
            [*command, *arguments, *([folder] if code else [])], capture_output=True, text=True, check=False, timeout=300,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        lines = [
            line.split(" ", 2)
            for line in result.stdout.splitlines()
            if line.startswith(("PASSED", "FAILED", "XFAIL", "SKIPPED"))
        ]
        return {words[1].rpartition("::")[2]: words[0] for words in lines}, result.stdout

    return run


def test_the_five_line_file_of_the_reference_backend_passes(run_pytest, rowwise_package):
    outcomes, output = run_pytest(rowwise_package / "tests", "-m", "not real")
    idle = {"what_is_declared_loads", "compiles_with_torch", "offloads_to_the_cpu"}  # it declares none of these
    passed = {name for name, outcome in outcomes.items() if outcome == "PASSED"}
    assert set(outcomes.values()) == {"PASSED", "SKIPPED"} and f", {len(idle)} skipped" in output, output
    tested = {name.partition("[")[0] for name in passed}
    assert tested == {f"test_{each.name}" for each in ALL if not each.real and each.name not in idle}
    run = {name for name in outcomes if name.startswith("test_saves_and_loads_back[")}
    expected = ("int8-llama", "int8-llama-tied", "int8-odd", "int8-bf16-scales-llama")  # two presets of one scheme
    assert run == {f"test_saves_and_loads_back[{case}]" for case in expected}


@pytest.mark.real
def test_the_reference_backend_keeps_its_floors(run_pytest, rowwise_package):
    outcomes, output = run_pytest(rowwise_package / "tests", "-m", "real")
    assert len(outcomes) == 2
    assert Counter(outcomes.values()).keys() == {"PASSED"}, output


def test_a_failure_says_where_to_mend_it(run_pytest):
    outcomes, output = run_pytest(
        "-k", "environment_check_is_quiet", "-p", "polyquant.testing.plugin",
        code="""
        class TestPrints(BackendConformance):
            backend = "rowwise-prints"
        """,
    )  # fmt: skip
    assert outcomes == {"test_environment_check_is_quiet": "FAILED"}, output
    assert "validate_environment prints: 'checking cpu" in output
    assert "cure: rowwise_mutants.py:" in output
    assert "validate_environment: print and change nothing" in output


def test_expected_failures_are_strict_both_ways(run_pytest):
    outcomes, output = run_pytest(
        code="""
        class TestPrints(BackendConformance):
            backend = "rowwise-prints"
            expected_failures = {"test_environment_check_is_quiet": "prints, for the test"}

        class TestCured(BackendConformance):
            backend = "rowwise-picky"
            expected_failures = {
                "test_options_survive_conversion[int8]": "was broken once",
                "test_loads[int8-odd]": "was broken once",
            }

        for each in list(vars(BackendConformance)):
            if each.startswith("test_") and each not in (
                "test_environment_check_is_quiet", "test_options_survive_conversion", "test_loads"
            ):
                delattr(BackendConformance, each)
        """
    )
    assert outcomes.pop("test_environment_check_is_quiet", None), output
    failed = {name for name, status in outcomes.items() if status == "FAILED"}
    assert failed == {"test_options_survive_conversion[int8]", "test_loads[int8-odd]"}, output
    assert "XFAIL" in output and "prints, for the test" in output
    assert "passes now; take it out of expected_failures, which says: was broken once" in output
    assert "is expected to fail (was broken once), but is not run at all: refuses odd" in output


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('backend = "rowwise"; expected_failures = {"test_saves_and_load_back": "?"}', "there is no test 'test_saves_and_load_back'. Did you mean 'test_saves_and_loads_back'?"),
        ('backend = "rowwise"; floors = {"int9": Floor(kl=1, top1=0)}', "there is no preset 'int9'. Did you mean 'int8'?"),
        ('backend = "rowwize"', "no backend 'rowwize'"),
    ],
)  # fmt: skip
def test_a_misspelt_name_in_the_class_is_an_error(run_pytest, body, message):
    outcomes, output = run_pytest(code=f"class TestOwn(BackendConformance):\n    {body}\n")
    assert outcomes == {}
    assert message in output


def test_the_floor_bites(make_subject):
    """A missing floor says what to write; the measured distance lies below the floor of these tests, not far."""
    every = {each.name for each in ALL} - {"stays_close_to_the_dense_model"}
    subject = make_subject("rowwise")
    subject.floors = {}
    outcomes = list(run_checks(subject, without=every))
    assert {outcome.status for outcome in outcomes} == {"failed"}
    assert "preset int8 has no floor; measured: KL 0.0" in outcomes[0].reason
    assert "Add to floors: 'int8': Floor(kl=" in outcomes[0].reason
    subject.floors = {"int8": Floor(kl=1e-9, top1=0.0), "int8-bf16-scales": Floor(kl=1.0, top1=1.1)}
    reasons = [outcome.reason for outcome in run_checks(subject, without=every)]
    assert "the floor allows KL 1e-09" in reasons[0]
    assert "the floor asks for top-1 agreement 1.1" in reasons[1]


@pytest.mark.parametrize(
    ("backend", "presets"),
    [
        ("bitsandbytes", ["nf4", "fp4", "int8"]),  # nf4-dq is nf4 with other constants
        ("gptq", ["int4", "int8"]),
        ("llama-cpp", ["Q4_K_M", "Q4_0", "Q8_0"]),  # does not plan
    ],
)
def test_other_architectures_run_once_a_scheme(backend, presets):
    handle = polyquant.backend(backend)
    run = {(each.name, case.preset, case.model) for each, case in cases(handle)}
    for each in ALL:
        if each.per in ("preset", "model"):
            asked = {(preset, model) for name, preset, model in run if name == each.name}
            whole = {(preset, FIRST if each.per == "model" else "") for preset in handle.info.presets}
            assert asked == whole | {(preset, model) for preset in presets for model in each.models}


def test_a_quantized_checkpoint_is_kept_until_what_makes_it_changes(make_subject, tmp_path, monkeypatch):
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path))
    made = []

    def make_checkpoint(dense, preset, out):
        made.append(preset)
        out.mkdir()
        (out / "preset").write_text(preset)

    def ask(preset):
        return make_subject("rowwise-reader", make_checkpoint=make_checkpoint).checkpoint(preset, "llama")

    first = ask("int8")
    assert (first.parent, (first / "preset").read_text()) == (tmp_path / "conformance" / "rowwise-reader", "int8")
    assert (ask("int8"), made) == (first, ["int8"])
    monkeypatch.setattr(keeping, "_installed", lambda: "another version of a library")
    second = ask("int8")
    assert (second != first, made) == (True, ["int8", "int8"])
    os.utime(first, (0, 0))
    monkeypatch.setattr(keeping, "_installed", lambda: "a third one")
    ask("int8")
    assert second.exists() and not first.exists(), "nobody has read the first for a week"


@pytest.mark.parametrize(
    ("backend", "home"), [("gptq", "polyquant_gptqmodel"), ("fouroversix", "polyquant_fouroversix")]
)
def test_a_kept_checkpoint_depends_on_the_plugins_own_files(make_subject, tmp_path, monkeypatch, backend, home):
    """Of a plugin that is a PluginBackend, and of one that is a class of its own."""
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path))

    def ask():
        subject = make_subject(backend, make_checkpoint=lambda dense, preset, out: out.mkdir())
        return subject.checkpoint(next(iter(subject.info.presets)), "llama")

    first, sources = ask(), keeping._sources
    monkeypatch.setattr(keeping, "_sources", lambda path: sources(path) + ("changed" if path.name == home else ""))
    assert ask() != first


def test_what_fails_to_be_made_leaves_nothing(make_subject, tmp_path, monkeypatch):
    monkeypatch.setenv("POLYQUANT_CACHE", str(tmp_path))

    def make_checkpoint(dense, preset, out):
        out.mkdir()
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        make_subject("rowwise-reader", make_checkpoint=make_checkpoint).checkpoint("int8", "llama")
    assert [path.suffix for path in (tmp_path / "conformance" / "rowwise-reader").iterdir()] == [".lock"]


def test_the_checks_run_without_pytest():
    code = "import sys; sys.modules['pytest'] = None; from polyquant.testing import running, catalog, Floor; print(len(catalog.ALL))"
    result = warm.run(["-c", code], seconds=300)
    assert result.stdout.strip() == str(len(ALL)), result.stderr


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tiny_models_are_no_degenerate_ones(folder, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tiny_model(name, folder / "tiny")
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    text = "Any text at all: 1 + 2, größer, 水."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert int(ids.max()) < model.config.vocab_size
    with torch.no_grad():
        logits = model(ids).logits[0]
    assert 1 < logits.std() < 4
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert 1 < entropy.mean() < torch.tensor(model.config.vocab_size).log() - 0.5
    assert len(logits.argmax(-1).unique()) > 3


def test_divergence_of_known_distributions():
    reference, candidate = (
        torch.tensor([[0.5, 0.25, 0.25], [1 / 3] * 3]).log(),
        torch.tensor([[0.25, 0.5, 0.25], [1 / 3] * 3]).log(),
    )
    expected = torch.tensor([0.5 * torch.tensor(2.0).log() - 0.25 * torch.tensor(2.0).log(), 0.0])
    torch.testing.assert_close(kl_divergence(reference + 7, candidate - 3), expected)
    assert top1_agreement(reference, candidate).tolist() == [False, True]


def test_divergence_from_itself_is_nothing():
    torch.manual_seed(0)
    logits = (20 * torch.randn(50, 1000)).bfloat16()
    assert kl_divergence(logits, logits.clone()).abs().max() <= 1e-6
    assert top1_agreement(logits, logits).all()


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((4,), (4,)), ((1, 3, 4), (1, 3, 4))])
def test_divergence_refuses_shapes_that_differ(shapes):
    reference, candidate = (torch.zeros(shape) for shape in shapes)
    for measure in (kl_divergence, top1_agreement):
        with pytest.raises(ValueError, match=r"one shape \(positions, vocabulary\)"):
            measure(reference, candidate)
