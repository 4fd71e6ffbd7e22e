"""Candidates as people write them."""

import re

import polyquant
import pytest
from polyquant.registry.installed import registry
from polyquant.comparison.candidates import Candidate, parse, presets_of
from polyquant.errors import CheckpointConflict, ConfigError, UnknownBackend
from polyquant.registry.written import resolved

pytestmark = pytest.mark.usefixtures("rowwise")


def read(text: str) -> Candidate:
    return parse(text, registry().info)


def test_a_candidate_is_a_backend_with_a_preset_and_options():
    assert read("rowwise") == Candidate(name="rowwise:int8", backend="rowwise", options={"bits": 8})
    assert read("rowwise:int8") == Candidate(name="rowwise:int8", backend="rowwise", options={"bits": 8})
    text = "rowwise:int8,compute_dtype=bfloat16,skip=layers.0,lm_head,skip_defaults=false"
    assert read(text).options == {
        "bits": 8, "compute_dtype": "bfloat16", "skip": ("layers.0", "lm_head"), "skip_defaults": False,
    }  # fmt: skip
    assert read("rowwise:bits=8").options == {"bits": 8}


def test_a_candidate_may_be_a_checkpoint():
    assert read("models/made.gguf") == Candidate(name="models/made.gguf", backend="", model="models/made.gguf")
    assert read("rowwise@made:bits=8").model == "made"
    assert read("owner/name").model == "owner/name"


def test_the_dense_model_is_a_candidate():
    assert read("dense").options == {"compute_dtype": "float32"}
    assert read("dense:bfloat16").options == {"compute_dtype": "bfloat16"}


def test_presets_become_candidates():
    assert [candidate.name for candidate in presets_of(polyquant.backend("rowwise").info)] == [
        "rowwise:int8",
        "rowwise:int8-bf16-scales",
    ]


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("rowise:int8", UnknownBackend, "Did you mean 'rowwise'?"),
        (
            "rowwise:int7",
            ConfigError,
            "rowwise has no preset 'int7'; there are int8, int8-bf16-scales. Did you mean 'int8'?",
        ),
        ("rowwise:bits=3", ConfigError, "bits must be"),
        ("rowwise:bit=8", ConfigError, "unknown option 'bit'"),
        ("rowwise:int8,nf4", ConfigError, "'nf4' is neither a preset nor name=value"),
        ("rowwise:bits=8,bits=8", ConfigError, "gives bits twice"),
        ("rowwise:", ConfigError, "is no candidate; one is written as"),
        ("rowwise@", ConfigError, "is no candidate"),
        ("", ConfigError, "is no candidate"),
        ("models/made.gguf:bits=8", ConfigError, "name the backend that is to read the checkpoint"),
        ("dense:int8", ConfigError, "compute_dtype must be"),
    ],
)
def test_what_is_no_candidate_is_said(text, error, said):
    with pytest.raises(error, match=re.escape(said)):
        read(text)


# the words of a query, and backends with presets, wherever a backend is named


def card(**more):
    from typing import Literal

    from polyquant.packable import PackableOptions
    from polyquant.types import BackendInfo, Capabilities, DeviceSupport

    class Options(PackableOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
        weights: Literal["int8", "int4", "float4", "int2"] = "int8"
        group_size: int | None = None
        fast: bool = False

        def __post_init__(self):
            if self.group_size and self.weights == "int8":
                raise ValueError("group_size applies to 4 bit")

        @property
        def weight_bits(self):
            return int(self.weights[-1])

        @property
        def scheme(self):
            return f"{self.weights}-fast" if self.fast else ""

    schemes = ("int8", "int4", "float4", "int2", "int2-fast", "codes")
    can = Capabilities(bits=(8, 4, 2, 5), schemes=schemes, devices=(DeviceSupport(type="cpu"),))
    presets = {"small": {"weights": "int8"}, **more}
    return BackendInfo(name="acme", summary="", options=Options, docs="", capabilities=can, presets=presets)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"bits": 8}, {}),
        ({"bits": 2}, {"weights": "int2"}),
        ({"scheme": "int2-fast"}, {"weights": "int2", "fast": True}),
        ({"scheme": "int8-fast", "weights": "int8"}, {"weights": "int8", "fast": True}),
        ({"bits": 2.0, "fast": True}, {"weights": "int2", "fast": True}),
        ({"scheme": "float4"}, {"weights": "float4"}),
        ({"bits": 4, "scheme": "int4", "group_size": 32}, {"weights": "int4", "group_size": 32}),
        ({"weights": "int4"}, {"weights": "int4"}),
        ({"weights": "int4", "bits": 4}, {"weights": "int4"}),
    ],
)
def test_words_of_a_query_become_options(given, options):
    assert resolved(card(), given) == options


def test_presets_choose_between_several():
    both = card(four={"weights": "float4"}, other={"weights": "int4"})
    assert resolved(both, {"bits": 4}) == {"weights": "float4"}
    assert resolved(both, {"bits": "4"}, strict=False) == {"weights": "float4"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 4}, "bits=4 may be several of acme's: say which, weights='int4' or weights='float4'"),
        (
            {"bits": 3},
            "acme has nothing with bits=3; bits are 8, 4, 2, 5, schemes int8, int4, float4, int2, int2-fast, codes, "
            "presets small",
        ),
        ({"bits": 5}, "acme reads checkpoints with bits=5, and none of its options makes one; presets are small"),
        ({"scheme": "codes"}, "acme reads checkpoints with scheme=codes, and none of its options makes one"),
        ({"scheme": "codes", "bits": 8}, "acme has nothing with bits=8, scheme=codes"),
        ({"bits": 4, "weights": "int8"}, "acme has nothing with bits=4, weights=int8"),
        ({"bits": 8, "scheme": "int4"}, "acme has nothing with bits=8, scheme=int4"),
        ({"bits": "many"}, "acme has nothing with bits=many"),
        ({"bits": 4, "weihgts": "int4"}, "unknown option 'weihgts'; .*Did you mean 'weights'"),
        ({"bits": 8, "group_size": 32}, "acme has nothing with bits=8, group_size=32"),
        ({"bits": 3, "compute_dtype": "float32"}, "acme has nothing with bits=3; bits are"),
        ({"bits": 5, "kernel": "library"}, "acme reads checkpoints with bits=5, and none of its options makes one"),
        (
            {"bits": 4, "kernel": "library"},
            "bits=4 may be several of acme's: say which, weights='int4' or weights='float4'$",
        ),
    ],
)
def test_words_that_come_to_nothing_are_refused_with_the_choices(given, message):
    with pytest.raises(ConfigError, match=message):
        resolved(card(), given)


@pytest.mark.parametrize(
    "info", [info for info in polyquant.backends() if info.name != "rowwise"], ids=lambda info: info.name
)
def test_every_backend_takes_the_words_that_its_card_answers_to(info):
    """`backends(bits=4)` names it, so `load(bits=4)` means something there, or says which of several."""
    handle = polyquant.backend(info.name)
    taken = []
    for word, values in (("bits", info.capabilities.bits), ("scheme", info.capabilities.schemes)):
        for value in values:
            try:
                handle.config({word: value})
                taken.append(word)
            except ConfigError as error:
                assert re.search("say which|reads checkpoints with|must be", str(error)), error
    assert "bits" in taken
    assert "scheme" in taken


def test_a_preset_goes_wherever_a_backend_is_named(tmp_path, run_python):
    from polyquant.isolated import handles
    from polyquant.testing.models import tiny_model

    model = tiny_model("llama", tmp_path)
    assert handles.written("rowwise:int8,compute_dtype=bfloat16", {"skip": ("layers.0",)}) == (
        "rowwise", {"bits": 8, "compute_dtype": "bfloat16", "skip": ("layers.0",)},
    )  # fmt: skip
    assert handles.written("rowwise", {"bits": 8}) == ("rowwise", {"bits": 8})
    loaded = polyquant.load(model, "rowwise:int8,compute_dtype=bfloat16", device="cpu")
    assert loaded.config.compute_dtype == "bfloat16"
    assert polyquant.plan(model, "rowwise:int8", device="cpu", context=8).backend == "rowwise"
    assert polyquant.quantize(model, "rowwise:int8", tmp_path / "out", device="cpu").is_dir()
    with pytest.raises(ConfigError, match=r"rowwise has no preset 'int9'; there are int8, .*Did you mean 'int8'\?"):
        polyquant.load(model, "rowwise:int9")
    with pytest.raises(UnknownBackend, match="no backend 'rowwyse'"):
        polyquant.load(model, "rowwyse:int8")
    stored = polyquant.load(tmp_path / "out", bits=8, scheme="int8-row", device="cpu")
    assert stored.backend.name == "rowwise"


def test_the_command_line_takes_presets_and_words(run_python, tmp_path):
    from polyquant.testing.models import tiny_model

    gguf = polyquant.backend("gguf")
    if gguf.problems("cpu"):
        pytest.skip("gguf does not run here")
    model = tiny_model("llama", tmp_path)
    for arguments in (("-b", "gguf:Q8_0"), ("-b", "gguf", "--bits", "8"), ("--backend=gguf", "--scheme", "Q8_0")):
        done = run_python("plan", str(model), *arguments, "--json", "--device", "cpu")
        assert done.returncode == 0, done.stderr
        assert '"type": "Q8_0"' in done.stdout
    assert "gguf has nothing with --bits 7" in run_python("plan", str(model), "-b", "gguf", "--bits", "7").stderr
    told = polyquant.load(
        polyquant.quantize(model, "gguf", tmp_path / "q8", type="Q8_0", device="cpu"), bits=8, device="cpu"
    )
    assert told.config.type == "Q8_0"
    with pytest.raises(CheckpointConflict, match="bits: requested 4, stored 8"):
        polyquant.load(tmp_path / "q8", bits=4, device="cpu")
