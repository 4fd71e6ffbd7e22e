"""The benchmarks of the packed runtime are well-formed, measure, and go on after a cell that fails."""

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import polyquant
import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
SCRIPT = EXAMPLES / "bench_packed.py"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("bench_packed_script", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def asked(bench):
    return bench.Asked(sizes=bench.SMALL, embeddings="8bit")


def test_every_part_lists_cells_that_are_compared_with_each_other(bench):
    for name in bench.PARTS:
        rows, _ = bench.rows_of(name, asked(bench), ())
        names = [row.cell.name for row in rows]
        assert names and len(set(names)) == len(names), name
        assert {row.cell.against for row in rows} <= {"", *names}, name
        part = bench.part(name)
        assert set(part.COMPARED) <= set(part.FIGURES)


def test_presets_come_from_the_cards(bench):
    rows, left_out = bench.rows_of("divergence", asked(bench), ())
    names = [row.cell.name for row in rows]
    assert {"bitsandbytes:nf4", "gptq:int4", "gptq:int4-act-order", "hqq:int8"} <= set(names)
    for name in names:
        backend, _, preset = name.partition(":")
        info = polyquant.backend(backend).info
        assert preset in info.presets and polyquant.backend(backend).can("pack")
    assert "hqq:int3" not in names and not any(name.startswith("aqlm") for name in names)
    assert all(each.reason for each in left_out)


def test_only_takes_what_a_cell_is_compared_with(bench):
    rows, _ = bench.rows_of("speed", asked(bench), ["hqq:int8"])
    assert [row.cell.name for row in rows] == ["llama-cpp:Q8_0", "hqq:int8"]
    rows, _ = bench.rows_of(
        "divergence", asked(bench), ["gptq:int4", "quanto"]
    )  # gptq:int4-act-order has a name of its own
    names = [row.cell.name for row in rows]
    assert "gptq:int4" in names and "gptq:int4-act-order" not in names and len(names) > 2


def test_a_part_that_is_none_is_refused():
    done = subprocess.run([sys.executable, str(SCRIPT), "sped", "--list"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no part sped; there are speed, models" in done.stderr


@pytest.mark.real
def test_cells_are_measured_in_turn_and_go_on_after_one_that_fails(bench, bitsandbytes, tmp_path, monkeypatch):
    rows, _ = bench.rows_of("architectures", asked(bench), ["gpt2 bits"])
    good, packed = [row.cell for row in rows]
    bad = bench.msgspec.structs.replace(
        good, name="bad", source=bench.msgspec.structs.replace(good.source, model="/no")
    )
    rows = [bench.Row(cell) for cell in (good, bad, packed)]
    said = list(bench.measured("architectures", rows, Namespace(rounds=2, threads=1, limit=300)))
    assert [len(row.answers) for row in rows] == [2, 0, 2]
    assert "/no" in rows[1].reason and any("bad" in line for line in said)
    assert rows[2].values("kernel")[0].startswith("packed")
    head, _, *lines = bench.table("architectures", rows).splitlines()[:5]
    assert head == "|  | decoded, tokens/s | ratio | kernel |"
    ratio = float(lines[2].split("|")[3])
    assert ratio == pytest.approx(rows[2].ratio("decoded", rows[0]), abs=0.01) and "/no" in lines[1]
    bench.write(tmp_path / "figures.json", {"threads": 1}, {"architectures": (rows, [])})
    written = json.loads((tmp_path / "figures.json").read_text())["parts"]["architectures"]["rows"]
    assert written[1]["reason"] and written[2]["rounds"][0]["figures"]["decoded"] > 0
