"""Functions that keep their input alone: values, gradients, and what is kept."""

from __future__ import annotations

import pytest
import torch

from megatron_dgpo.mcore.lean import _SwiGLU, place_rows, rms_norm

EPS = 1e-5


def exact_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def exact_swiglu(x):
    gate, value = x.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * value


def inputs(dtype):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(7, 1, 48, generator=g, dtype=torch.float64) * 3
    x[3] *= 1e-3  # where eps counts
    weight = torch.randn(48, generator=g, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


CASES = {
    "norm": (lambda x, w: rms_norm(x, w, EPS), exact_norm),
    "swiglu": (lambda x, w: _SwiGLU.apply(x), lambda x, w: exact_swiglu(x)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype, unit", [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)])
def test_values_and_gradients_are_those_of_the_formula(name, dtype, unit):
    ours, exact = CASES[name]
    x, weight = inputs(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    out, wanted = ours(x, weight), exact(*wide)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(
        dtype
    )
    out.backward(grad)
    wanted.backward(grad.double())
    assert out.dtype == dtype
    pairs = [(out, wanted), (x.grad, wide[0].grad)] + (
        [(weight.grad, wide[1].grad)] if name == "norm" else []
    )
    for found, right in pairs:
        # Sums of 48 numbers and some ten roundings, of numbers as large as the largest of a row.
        assert ((found.double() - right).abs() <= 64 * unit * right.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_differences(name):
    ours, _ = CASES[name]
    assert torch.autograd.gradcheck(ours, inputs(torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_the_input_alone_is_kept(name):
    x, weight = inputs(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        CASES[name][0](x, weight)
    assert {t.untyped_storage().data_ptr() for t in kept} <= {
        t.untyped_storage().data_ptr() for t in (x, weight)
    }


def test_a_frozen_weight_gets_no_gradient():
    x, weight = inputs(torch.float32)
    rms_norm(x, weight.detach(), EPS).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_rows_are_placed_and_their_gradients_come_back():
    x, _ = inputs(torch.float64)
    place = torch.tensor([8, 0, 3, 1, 9, 4, 2])
    out = place_rows(x, place, 10)
    assert torch.equal(out[place], x)
    assert not out[[5, 6, 7]].any() and out.shape == (10, 1, 48)
    assert torch.autograd.gradcheck(lambda x: place_rows(x, place, 10), x)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        place_rows(x, place, 10)
    assert [t.dtype for t in kept] == [torch.int64]
