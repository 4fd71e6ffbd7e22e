"""Typed options: strict, explained, and readable from text."""

from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta
from polyquant.errors import ConfigError
from polyquant.options import BackendOptions, convert, describe_options


class Options(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    bits: Annotated[Literal[2, 4, 8], Meta(description="bits a weight")] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    group_size: int = 64
    threshold: float | None = None
    symmetric: bool = True

    def __post_init__(self):
        if self.bits == 2 and self.symmetric:
            raise ValueError("2 bit has no symmetric form")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "nf5"}, r"quant_type must be 'nf4' or 'fp4', got 'nf5'. Did you mean 'nf4'\?"),
        ({"quanttype": "nf4"}, r"unknown option 'quanttype'; there are bits, .*Did you mean 'quant_type'\?"),
        ({"bits": 3}, "bits must be 2, 4 or 8, got 3"),
        ({"bits": "4"}, "bits must be 2, 4 or 8, got '4'"),
        ({"group_size": "large"}, "group_size must be integer, got 'large'"),
        ({"symmetric": 1}, "symmetric must be true/false, got 1"),
        ({"compute_dtype": "fp32"}, "compute_dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got 'fp32'"),
        ({"bits": 2}, "2 bit has no symmetric form"),
        ({"skip": 3}, "skip must be list, got 3"),
    ],
)
def test_bad_options_say_what_is_allowed(options, message):
    with pytest.raises(ConfigError, match=message):
        convert(Options, options)


def test_text_is_read_where_asked():
    text = {"bits": "8", "threshold": "1.5", "symmetric": "false", "skip": "lm_head, layers.0"}
    read = convert(Options, text, strict=False)
    assert read == Options(bits=8, threshold=1.5, symmetric=False, skip=("lm_head", "layers.0"))


def test_options_are_frozen():
    with pytest.raises(AttributeError):
        Options().bits = 8


def test_options_are_described_own_ones_first():
    described = {option.name: option for option in describe_options(Options)}
    assert list(described)[:3] == ["bits", "quant_type", "group_size"]
    assert described["bits"].values == (2, 4, 8)
    assert described["bits"].description == "bits a weight"
    assert described["symmetric"].kind == "true/false"
    assert described["threshold"].kind == "number"


@given(
    st.dictionaries(
        st.text(max_size=12),
        st.none() | st.integers() | st.text(max_size=9) | st.lists(st.integers(), max_size=3),
        max_size=4,
    )
)
def test_any_input_gives_options_or_a_config_error(options):
    for strict in (True, False):
        try:
            found = convert(Options, options, strict=strict)
        except ConfigError as error:
            assert str(error)
        else:
            assert isinstance(found, Options)
