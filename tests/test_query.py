"""Capability queries."""

import pytest
from polyquant.errors import ConfigError
from polyquant.options import BackendOptions
from polyquant.registry.query import select
from polyquant.types import BackendInfo, Capabilities, DeviceSupport


def card(name, **capabilities):
    devices = tuple(DeviceSupport(type=kind) for kind in capabilities.pop("devices", ("cpu",)))
    can = Capabilities(**{"bits": (4,), "schemes": ("nf4",), **capabilities}, devices=devices)
    return BackendInfo(name=name, summary="", capabilities=can, options=BackendOptions, docs="")


CARDS = [
    card("four", on_the_fly=True),
    card("eight", bits=(8,), schemes=("int8",), devices=("cuda",), loads_prequantized=("gptq",)),
    card("both", bits=(4, 8), schemes=("nf4", "int8"), devices=("cpu", "cuda"), saves=True),
]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ({}, ["four", "eight", "both"]),
        ({"bits": 4}, ["four", "both"]),
        ({"bits": 8.0, "device": "cuda:1"}, ["eight", "both"]),
        ({"on_the_fly": True}, ["four"]),
        ({"on_the_fly": False, "scheme": "nf4"}, ["both"]),
        ({"quant_method": "gptq"}, ["eight"]),
        ({"bits": None}, ["four", "eight", "both"]),
    ],
)
def test_queries_filter(query, names):
    assert select(CARDS, query).names == names


def test_nothing_found_names_the_nearest_misses_first_with_reasons():
    selection = select(CARDS, {"bits": 8, "on_the_fly": True, "saves": True})
    assert not selection
    assert [(miss.name, len(miss.reasons)) for miss in selection.misses] == [("both", 1), ("eight", 2), ("four", 2)]
    assert selection.misses[2].reasons == ("bits are 4, not 8", "saves is no")
    assert "both: on_the_fly is no" in repr(selection)


def test_an_unknown_capability_is_an_error():
    with pytest.raises(ConfigError, match=r"unknown capability 'bitz'; there are bits, .*Did you mean 'bits'\?"):
        select(CARDS, {"bitz": 4})
