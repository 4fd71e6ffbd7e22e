"""Weights are rounded in bands of rows, as they are of all rows at once."""

from __future__ import annotations

import pytest
import torch
from polyquant.packed_weights import bands


def rounded(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor of the rows, one with half as many, and one with a row for each three or fewer."""
    return {
        "codes": (rows * 10).to(torch.int8),
        "pairs": rows[: len(rows) // 2 * 2].unflatten(0, (-1, 2)).sum(1),
        "blocks": torch.stack([each.abs().amax() for each in rows.split(3)])[:, None],
    }


@pytest.mark.parametrize("weights", [1, 70, 100, 10**6])
@pytest.mark.parametrize("shape", [(24, 10), (26, 10), (6, 400), (28, 7)])
def test_bands_make_what_all_rows_do(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], weights: int) -> None:
    monkeypatch.setitem(bands.BAND_WEIGHTS, "cpu", weights)
    weight, seen = torch.randn(shape, generator=torch.Generator().manual_seed(0)), list[int]()
    made = bands.in_bands(weight, lambda rows: (seen.append(len(rows)), rounded(rows))[1], multiple=6)
    assert sum(seen) == shape[0] and max(seen) <= max(6, -(-weights // shape[1] // 6) * 6 + 6)
    for name, whole in rounded(weight).items():
        assert torch.equal(made[name], whole), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numbers", [[-3.0, 2.0], [1.0, 2.5], [-1.0, -0.5], [0.0, -0.0]])
def test_the_largest_number(numbers: list[float], dtype: torch.dtype) -> None:
    weight = torch.tensor([numbers], dtype=dtype)
    most = bands.largest(weight)
    assert torch.equal(most, weight.float().abs().amax()) and not bool(torch.signbit(most))
