"""An Adam with the interface of Transformer Engine's FusedAdam, which needs a GPU to be installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


class LazyAdam(torch.optim.Optimizer):
    """AdamW whose state appears in its first step and whose groups count the steps, as integers."""

    def __init__(
        self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float, **options: Any
    ) -> None:
        assert options.pop("adam_w_mode", True) and not options.pop("capturable", False) and not options
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.store_param_remainders = False

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        assert not store_param_remainders
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(param, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group["step"] + 1 if "step" in group else 1
            assert type(group["step"]) is int, "the kernels take nothing else"
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.initialize_state(p, False)
                mean, square = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                mean.lerp_(p.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = (square / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
                p.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1 ** group["step"]))


@contextmanager
def in_megatron() -> Iterator[None]:
    """Megatron takes LazyAdam for Transformer Engine's."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with (
        mock.patch.multiple(optimizer, Adam=LazyAdam, USING_PYTORCH_OPTIMIZER=False),
        mock.patch.multiple(distrib_optimizer, Adam=LazyAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True),
    ):
        yield
