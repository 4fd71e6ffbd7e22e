"""`run` and `chat` without a backend: what `recommend` puts first of what quantizes while it loads, said aloud."""

import msgspec
import polyquant
import pytest
from polyquant.cli.choosing import with_backend
from polyquant.cli.arguments import Loading
from polyquant.errors import PolyquantError
from polyquant.loading.options import LoadOptions

pytestmark = pytest.mark.usefixtures("bitsandbytes")


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")


def loading(backend=None, **more):
    return Loading(backend, None, {**msgspec.structs.asdict(LoadOptions()), "device": "cpu", **more})


def test_a_dense_model_gets_what_recommend_puts_first(llama, capsys):
    chosen = with_backend(str(llama), loading())
    best = polyquant.recommend(str(llama), needs=("on_the_fly",), device="cpu").best
    assert (chosen.backend, {name: chosen.options[name] for name in best.candidate.options}) == (
        best.candidate.backend, best.candidate.options,
    )  # fmt: skip
    assert polyquant.backends(on_the_fly=True).names.count(chosen.backend) == 1
    said = capsys.readouterr().err
    assert best.candidate.name in said
    assert "another one: --backend NAME" in said


def test_a_backend_that_is_named_and_a_quantized_checkpoint_are_left_alone(llama, tmp_path, capsys):
    named = loading("bitsandbytes:nf4")
    assert with_backend("nowhere", named) is named
    polyquant.quantize(str(llama), "bitsandbytes:nf4", tmp_path / "quantized")
    plain = loading()
    assert with_backend(str(tmp_path / "quantized"), plain) is plain
    assert capsys.readouterr().err == ""


def test_a_wrong_model_is_refused_before_anything_is_planned(tmp_path):
    with pytest.raises(PolyquantError, match="no such file or folder"):
        with_backend(str(tmp_path / "nowhere"), loading())


def test_run_without_a_backend_runs(llama, run_python):
    result = run_python("run", str(llama), "Hello", "--max-new-tokens", "2", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "candidates that run on cpu and fit" in result.stderr
    assert result.stdout.strip()
