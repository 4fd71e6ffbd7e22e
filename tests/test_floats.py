"""Four-bit floats: the nearest of sixteen, found by comparing with all."""

import pytest
import torch
from polyquant.plugin.floats import E2M1, e2m1_codes

EDGES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # halfway between neighbours


def numbers(dtype):
    """Every half-way number, what lies next to it on both sides, and what lies outside, of both signs."""
    edges = torch.tensor(EDGES, dtype=dtype)
    beside = [torch.nextafter(edges, torch.tensor(end, dtype=dtype)) for end in (0.0, 9.0)]
    others = torch.tensor([0.0, 1e-7, 5.9, 6.0, 6.1, 4e4, torch.inf], dtype=dtype)
    sizes = torch.cat([edges, *beside, others, torch.arange(0, 7, 0.03125).to(dtype)])
    return torch.cat([sizes, -sizes])


@pytest.mark.parametrize("ties", ["even", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_codes_are_those_of_the_nearest_numbers(ties, dtype):
    given = numbers(dtype)
    far = (given.double().abs().clamp(max=9)[:, None] - torch.tensor(E2M1[:8]).double()).abs()
    nearest = far == far.amin(1, keepdim=True)
    order = torch.tensor(
        [1 if ties == "even" and code % 2 else 0 for code in range(8)]
    )  # of a tie the least, then the first
    expected = torch.where(nearest, order * 8 + torch.arange(8), 99).argmin(1) + 8 * (given < 0)
    assert torch.equal(e2m1_codes(given, ties), expected.to(torch.uint8))


def test_what_is_no_number_has_the_largest_code():
    assert e2m1_codes(torch.tensor([torch.nan])).item() == 7
