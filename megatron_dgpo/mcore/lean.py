"""A layer's functions that keep their input at most for the backward pass, and make the rest of it again.

torch composes them of smaller ones on a CPU, each of which keeps what it was given. Of a float32 layer's
memory for the backward pass that is a third.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        grad_wide, x_wide = grad.to(wide), x.to(wide)
        inverse = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + ctx.eps)
        normed = x_wide * inverse
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            # y = w x r with r = (mean x^2 + eps)^(-1/2): dx = r (w g - x r mean(w g x r)).
            scaled = grad_wide * weight.to(wide)
            shared = (scaled * normed).mean(-1, keepdim=True)
            grad_x = (scaled.addcmul_(normed, shared, value=-1) * inverse).to(x.dtype)
        return grad_x, grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, value = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        of_gate, of_value = out.chunk(2, dim=-1)
        of_gate.copy_(torch.ops.aten.silu_backward(grad * value, gate))
        torch.mul(F.silu(gate), grad, out=of_value)
        return out


class _PlaceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place_T: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(place_T)
        return x.new_zeros((rows, *x.shape[1:])).index_copy_(0, place_T, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (place_T,) = ctx.saved_tensors
        return grad.index_select(0, place_T), None, None


def place_rows(x: Tensor, place_T: Tensor, rows: int) -> Tensor:
    """(rows, ...), zeros but for x's (T, ...) at `place_T`, int64 without repetitions. torch's index_copy
    keeps x, of which it wants the shape."""
    return _PlaceRows.apply(x, place_T, rows)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch's rms_norm over the last dimension, (..., H) with weight (H,)."""
    if x.is_cuda:  # torch's own keeps no more there
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class SwiGLU(MegatronModule):
    """silu(gate) * value of (..., 2 F), the gate first: a module for the activation of Megatron's MLP."""

    def forward(self, x: Tensor) -> Tensor:
        return _SwiGLU.apply(x)
