"""Products with frozen weights: what they give, their gradients, and that no dense weight outlives them."""

import weakref

import pytest
import torch
from polyquant.packed_weights import frozen
from polyquant.plugin.layers import differentiable, frozen_linear, rows_at_a_time, weight_rows


@pytest.fixture
def weight():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def made_anew(weight, made):
    """Pieces of two rows, each a new tensor, of which `made` keeps a weak reference."""

    def pieces():
        for rows in weight.split(2):
            piece = rows.clone()
            made.append(weakref.ref(piece))
            yield piece
            del piece

    return pieces


@pytest.mark.parametrize("bias", [None, torch.arange(6.0)], ids=["no bias", "bias"])
def test_a_product_in_pieces_is_that_of_the_whole(weight, bias):
    inputs, made = torch.randn(2, 3, 4, requires_grad=True), []
    expected = torch.nn.functional.linear(inputs, weight, bias)
    outputs = frozen_linear(inputs, made_anew(weight, made), bias)
    torch.testing.assert_close(outputs, expected)
    assert len(made) == 3 and not any(piece() is not None for piece in made), "a piece is kept for the gradient"
    gradient = torch.randn(2, 3, 6)
    outputs.backward(gradient)
    torch.testing.assert_close(inputs.grad, gradient @ weight)
    assert len(made) == 6 and not any(piece() is not None for piece in made)
    with torch.no_grad():
        assert torch.equal(frozen_linear(inputs, made_anew(weight, made), bias), outputs)


def test_a_bias_that_is_trained_gets_its_gradient(weight):
    inputs, bias = torch.randn(2, 3, 4, requires_grad=True), torch.nn.Parameter(torch.zeros(6))
    gradient = torch.randn(2, 3, 6)
    frozen_linear(inputs, lambda: weight.split(2), bias).backward(gradient)
    torch.testing.assert_close(bias.grad, gradient.sum((0, 1)))


def test_the_product_is_computed_in_the_inputs_dtype(weight):
    inputs = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    outputs = frozen_linear(inputs, lambda: [weight])
    assert torch.equal(outputs, inputs @ weight.bfloat16().T)
    outputs.sum().backward()
    assert inputs.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("at_a_time", [1, 4, 256])
def test_a_gradient_passes_a_matmul_that_has_none(weight, monkeypatch, at_a_time):
    monkeypatch.setattr(frozen, "IDENTITY_ROWS", at_a_time)
    inputs = torch.randn(3, 6, requires_grad=True)

    def multiply(rows):
        with torch.no_grad():
            return rows @ weight

    assert torch.equal(torch.cat(list(weight_rows(multiply, inputs.detach()))), weight)
    outputs = differentiable(multiply, inputs)
    outputs.backward(gradient := torch.randn(3, 4))
    torch.testing.assert_close(outputs, inputs @ weight)
    torch.testing.assert_close(inputs.grad, gradient @ weight.T)
    assert not differentiable(multiply, inputs.detach()).requires_grad


def test_rows_at_a_time_fill_the_chunk():
    assert rows_at_a_time(1024, torch.device("cpu")) == 1024
    assert rows_at_a_time(2**30, torch.device("cpu")) == 1
    assert rows_at_a_time(1024, torch.device("cuda")) == 2**16
