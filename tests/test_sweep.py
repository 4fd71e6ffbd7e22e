"""Sweeps: one option over several backends, in Python, in a shell, in a file."""

import polyquant
import pytest
from polyquant.cli.comparing import _read, _sweep
from polyquant.comparison.candidates import parse
from polyquant.comparison.sweep import swept
from polyquant.errors import ConfigError
from polyquant.registry.installed import registry
from polyquant.testing.models import tiny_model

QUICK = {"device": "cpu", "parts": ("quality",), "windows": 1}


def candidates(*texts, **sweep):
    return swept([parse(text, registry().info) for text in texts], sweep, registry().info)


def test_every_backend_gets_every_value_and_names_read_back():
    found = candidates("dense", "hqq:int4", "gptq", group_size=["32", 64])
    assert [each.name for each in found] == [
        "dense", "hqq:int4,group_size=32", "hqq:int4,group_size=64", "gptq:int4,group_size=32", "gptq:int4,group_size=64",
    ]  # fmt: skip
    assert [each.options["group_size"] for each in found[1:]] == [32, 64, 32, 64]
    assert all(each.options["bits"] == 4 for each in found[1:])
    assert [parse(each.name, registry().info) for each in found] == found
    assert candidates("hqq:int4") == [parse("hqq:int4", registry().info)]


def test_several_options_give_every_combination():
    found = candidates("hqq:int4,compute_dtype=float32", bits=[4, 8], group_size=[32, 64])
    assert [(each.options["bits"], each.options["group_size"]) for each in found] == [
        (4, 32),
        (4, 64),
        (8, 32),
        (8, 64),
    ]
    assert all(each.options["compute_dtype"] == "float32" for each in found)
    (one,) = candidates("hqq:int4,emulate_activations=true", group_size=[32])
    assert one.emulated and one.options["group_size"] == 32


@pytest.mark.parametrize(
    ("texts", "sweep", "said"),
    [
        (
            ["hqq:int4", "bitsandbytes:nf4"],
            {"group_size": [32]},
            "bitsandbytes:nf4 cannot be swept over group_size: bits",
        ),
        (["hqq:int4,group_size=64"], {"group_size": [32]}, "gives group_size itself"),
        (["hqq:int4"], {"group_size": [32, 65]}, "hqq:int4,group_size=65: group_size must be"),
        (["hqq@folder"], {"group_size": [32]}, "hqq@folder is a checkpoint"),
        (["hqq:int4"], {"group_size": []}, "lists its values"),
        (["hqq:int4"], {"group_size": "32"}, "lists its values"),
    ],
)
def test_what_cannot_be_swept_is_refused(texts, sweep, said):
    with pytest.raises(ConfigError, match=said):
        candidates(*texts, **sweep)


def test_a_shell_and_a_file_write_sweeps(tmp_path, run_python):
    assert _sweep("group-size=32, 64") == ("group_size", ["32", "64"])
    for wrong in ("group_size", "group_size=", "=32"):
        with pytest.raises(ConfigError, match="--sweep is written as group_size=32,64,128"):
            _sweep(wrong)
    file = tmp_path / "run.toml"
    file.write_text('candidates = ["hqq:int4"]\n[sweep]\ngroup_size = [32, 64]\n')
    assert _read(file)["sweep"] == {"group_size": [32, 64]}
    file.write_text("[sweep]\ngroup_size = 32\n")
    with pytest.raises(ConfigError, match="Expected `array`"):
        _read(file)
    refused = run_python("compare", "builtin:smollm2", "-c", "bitsandbytes:nf4", "--sweep", "group_size=32,64")
    assert refused.returncode == 2
    assert "polyquant backends --option group_size" in refused.stderr


def test_a_sweep_is_measured_row_by_row(tmp_path, rowwise, warm_children):
    found = polyquant.compare(
        tiny_model("llama", tmp_path / "tiny"), ["rowwise:int8", "bitsandbytes:nf4"], out=tmp_path / "out",
        sweep={"compute_dtype": ["float32", "bfloat16"]}, **QUICK,
    )  # fmt: skip
    assert [(row.candidate.name, row.status) for row in found.rows] == [
        ("rowwise:int8,compute_dtype=float32", "done"),
        ("rowwise:int8,compute_dtype=bfloat16", "done"),
        ("bitsandbytes:nf4,compute_dtype=float32", "done"),
        ("bitsandbytes:nf4,compute_dtype=bfloat16", "done"),
    ]
    assert [row.result.compute_dtype for row in found.rows] == ["float32", "bfloat16"] * 2
    assert "-c rowwise:int8,compute_dtype=bfloat16" in found.command


def test_backends_are_found_by_an_option():
    names = polyquant.backends(option="group_size").names
    assert {"hqq", "gptq"} <= set(names) and "bitsandbytes" not in names
    both = polyquant.backends(option="group_size", on_the_fly=True)
    assert set(both.names) == set(names) & set(polyquant.backends(on_the_fly=True).names)
    reasons = {miss.name: miss.reasons for miss in both.misses}
    assert any(
        reason.startswith("options are ") and reason.endswith("not group_size") for reason in reasons["bitsandbytes"]
    )
    with pytest.raises(ConfigError, match="no backend has an option 'group_siz'.*Did you mean 'group_size'"):
        polyquant.backends(option="group_siz")
