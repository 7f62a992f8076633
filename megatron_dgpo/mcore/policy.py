"""The policy in training: Megatron's DDP, distributed optimizer, schedules, and reference weights.

`Policy` is given functions of (hidden states, LM-head shard, micro-batch); it knows nothing of any
algorithm. These functions run on the last pipeline stage, on every rank of its TP group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_dgpo import patches, platform
from megatron_dgpo.mcore.fields import DDP, OPTIMIZER
from megatron_dgpo.mcore.model import PolicyModel
from megatron_dgpo.mcore.reference import Reference, Turns, WithReferenceFn
from megatron_dgpo.types import PackedBatch

Result = TypeVar("Result")
MicrobatchFn = Callable[[Tensor, Tensor, PackedBatch], Result]
"""(hidden (T, H), head weight (K, H), micro-batch) -> anything."""
LossFn = Callable[[Tensor, Tensor, PackedBatch], tuple[Tensor, Any]]
"""Like MicrobatchFn; the scalar loss is this micro-batch's share of the mini-batch's sum."""
OnBatch = Callable[[], object]
"""Called after a micro-batch's forward pass on this rank's stage."""


def ignore() -> None:
    """Nobody counts."""


class NonFiniteUpdate(RuntimeError):
    """The loss or the gradient is not a number; the parameters must not be used any more."""


@dataclasses.dataclass
class UpdateResult:
    metrics: list[Any]
    """One entry a micro-batch, on the last stage; empty elsewhere."""
    grad_norm: float
    learning_rate: float


def ddp_config(fields: Mapping[str, Any]) -> DistributedDataParallelConfig:
    """Megatron's, with fields of it by name. Raises ValueError naming one that it does not have or take."""
    defaults = dict(use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    return DistributedDataParallelConfig(**{**defaults, **DDP.values(fields)})


def optimizer_config(c: Any, params_dtype: torch.dtype) -> OptimizerConfig:
    """Megatron's, from config.OptimizerConfig. Raises ValueError as `ddp_config`."""
    names = ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
    defaults = dict(
        {name: getattr(c, name) for name in names},
        optimizer="adam",
        bf16=params_dtype == torch.bfloat16,
        params_dtype=params_dtype,
        use_distributed_optimizer=True,
        store_param_remainders=False,  # a checkpoint has weights, and not the bits that bfloat16 lacks
    )
    return OptimizerConfig(**{**defaults, **OPTIMIZER.values(c.megatron)})


def pad_for_sequence_parallel(batch: PackedBatch, multiple: int) -> PackedBatch:
    """Lengthen the last sequence with masked tokens until T divides by `multiple`.

    Attention is causal and the added targets are masked, so nothing else changes.
    """
    missing = -batch.num_tokens % multiple
    if missing == 0:
        return batch

    def grow(x: Tensor, fill: Tensor) -> Tensor:
        return torch.cat((x, fill.to(x.dtype)))

    zeros = batch.tokens_T.new_zeros(missing)
    more = torch.arange(1, missing + 1, device=zeros.device) + batch.positions_T[-1]
    cu_seqlens = batch.cu_seqlens.clone()
    cu_seqlens[-1] += missing
    return dataclasses.replace(
        batch,
        tokens_T=grow(batch.tokens_T, zeros),
        targets_T=grow(batch.targets_T, zeros),
        positions_T=grow(batch.positions_T, more),
        loss_mask_T=grow(batch.loss_mask_T, zeros),
        cu_seqlens=cu_seqlens,
        coefficients_T=None if batch.coefficients_T is None else grow(batch.coefficients_T, zeros),
    )


class Policy:
    """A model that is trained, with everything of Megatron that training takes.

    Args:
        model: this rank's part, with its weights loaded.
        optimizer: config.OptimizerConfig; `total_updates` is the length of its schedule.
        ddp: fields of Megatron's DistributedDataParallelConfig by name.
        reference: keep a copy of the present weights as the reference, and where (see `Reference`).
    """

    def __init__(
        self,
        model: PolicyModel,
        groups: platform.Groups,
        optimizer: Any,
        *,
        total_updates: int,
        ddp: Mapping[str, Any] | None = None,
        reference: str | None = None,
    ) -> None:
        self.model = model
        self.groups = groups
        self.shape = model.shape
        self.config = model.config
        self.updates = 0
        """How often `update` has changed the weights."""
        self._reference = None if reference is None else Reference(model, groups, reference)
        with patches.megatron_calls():
            self.ddp = self._wrap(ddp or {})
            self.optimizer = self._build_optimizer(optimizer)
            self.scheduler = _build_scheduler(self.optimizer, optimizer, total_updates)
        self.config.finalize_model_grads_func = finalize_model_grads

    def _wrap(self, fields: Mapping[str, Any]) -> DistributedDataParallel:
        wrapped = DistributedDataParallel(self.config, ddp_config(fields), self.model)
        wrapped.broadcast_params()
        self.config.no_sync_func = wrapped.no_sync
        return wrapped

    def _build_optimizer(self, c: Any) -> Any:
        config = optimizer_config(c, self.config.params_dtype)
        optimizer = get_megatron_optimizer(config, [self.ddp], use_gloo_process_groups=platform.has_gpu())
        allocate_state(the_optimizer(optimizer).optimizer)
        return optimizer

    # --- passes -----------------------------------------------------------------------------------

    def forward(
        self,
        batches: Sequence[PackedBatch],
        fn: MicrobatchFn[Result],
        on_batch: OnBatch = ignore,
        before: Callable[[], None] = ignore,
    ) -> list[Result]:
        """Run the model over micro-batches without gradients; `before` is called before each on this stage.

        Returns fn's result for each micro-batch on the last stage, an empty list on the others.
        """
        self.ddp.eval()
        with torch.no_grad():
            results = self._schedule(batches, fn, on_batch, before, forward_only=True)
        self.ddp.train()
        return results

    def update(
        self, batches: Sequence[PackedBatch], loss_fn: LossFn, on_batch: OnBatch = ignore
    ) -> UpdateResult:
        """One optimizer step on a mini-batch given as this rank's micro-batches.

        Losses and gradients of all micro-batches and data-parallel ranks are *summed*.

        Raises:
            NonFiniteUpdate: on every rank alike.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        metrics = self._schedule(batches, loss_fn, on_batch, ignore, forward_only=False)
        self.updates += 1
        with patches.megatron_calls():
            ok, grad_norm, _ = self.optimizer.step()
        learning_rate = max(g["lr"] for g in self.optimizer.param_groups)
        # The norm is global and covers every gradient, so all ranks come to the same verdict.
        if not ok or grad_norm is None or not torch.isfinite(torch.tensor(float(grad_norm))):
            raise NonFiniteUpdate(f"the gradient norm is {grad_norm}")
        self.scheduler.step(1)
        return UpdateResult(metrics, float(grad_norm), float(learning_rate))

    def _schedule(
        self,
        batches: Sequence[PackedBatch],
        fn: Callable,
        on_batch: OnBatch,
        before: Callable[[], None],
        *,
        forward_only: bool,
    ) -> list[Any]:
        if not batches:
            raise ValueError("a pass needs at least one micro-batch on every rank (see data.empty_batch)")
        if self.config.sequence_parallel:
            batches = [pad_for_sequence_parallel(b, self.groups.tp.size()) for b in batches]
        return _schedule(self.ddp, self.model, batches, fn, on_batch, before, forward_only=forward_only)

    # --- reference --------------------------------------------------------------------------------

    @property
    def reference(self) -> Reference:
        """Raises RuntimeError where the policy was built without one."""
        if self._reference is None:
            raise RuntimeError("this policy was built without a reference")
        return self._reference

    def forward_with_reference(
        self, batches: Sequence[PackedBatch], fn: WithReferenceFn[Result], on_batch: OnBatch = ignore
    ) -> list[Result]:
        """Run the reference and the policy over micro-batches without gradients; `forward` otherwise.

        Hidden states of the reference live until `fn` has had them: of one micro-batch at a time, or where
        its weights are in host memory, of as many as fit into a fixed memory on the device.
        """
        if self.reference.on_device:
            with Turns(self.reference, fn) as turns:
                return turns.policys(
                    self.forward(
                        [b for batch in batches for b in (batch, batch)], turns.take, on_batch, turns.next
                    )
                )
        results: list[Result] = []
        row_bytes = self.shape.hidden_size * self.config.params_dtype.itemsize
        if self.config.sequence_parallel:
            row_bytes //= self.groups.tp.size()
        for window in self.reference.windows(batches, row_bytes):
            with self.reference.lent():
                kept = iter(self.forward(window, lambda hidden_TH, _, __: hidden_TH, on_batch))
            results += self.forward(window, partial(_with_next, fn, kept), on_batch)
        return results


def _with_next(
    fn: WithReferenceFn[Result], kept: Iterator[Tensor], hidden: Tensor, weight: Tensor, batch: PackedBatch
) -> Result:
    return fn(hidden, weight, batch, next(kept))


class Frozen:
    """A model that is scored, and not trained: the part of `Policy` that this takes."""

    def __init__(self, model: PolicyModel, groups: platform.Groups) -> None:
        self.model = model
        self.groups = groups
        self.shape = model.shape
        self.config = model.config

    def forward(self, batches: Sequence[PackedBatch], fn: MicrobatchFn[Result]) -> list[Result]:
        """`Policy.forward`."""
        return forward(self.model, batches, fn)


@torch.no_grad()
def forward(model: PolicyModel, batches: Sequence[PackedBatch], fn: MicrobatchFn[Result]) -> list[Result]:
    """`Policy.forward` of a model that is not trained: without buffers for gradients or an optimizer."""
    return _schedule(model, model, batches, fn, ignore, ignore, forward_only=True)


def _schedule(
    wrapped: Any,
    model: PolicyModel,
    batches: Sequence[PackedBatch],
    fn: Callable,
    on_batch: OnBatch,
    before: Callable[[], None],
    *,
    forward_only: bool,
) -> list[Any]:
    """Megatron's schedule over micro-batches of the model, or of what it is wrapped in for training."""

    def on_last_stage(batch: PackedBatch, hidden: Tensor, non_loss_data: bool = False) -> Any:
        out = fn(hidden.squeeze(1), model.head_weight, batch)
        if non_loss_data:
            return out
        loss, metrics = out
        # A token count of 0 tells Megatron not to divide: coefficients are global already.
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), metrics

    def forward_step(batches_left: Iterator[PackedBatch], model: Any) -> tuple[Tensor, Callable]:
        batch = next(batches_left)
        before()
        hidden = model(batch)
        on_batch()
        return hidden, partial(on_last_stage, batch)

    with patches.megatron_calls():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[wrapped],
            num_microbatches=len(batches),
            seq_length=max(b.num_tokens for b in batches),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def the_optimizer(optimizer: Any) -> Any:
    """Megatron's distributed optimizer inside its chain, which for a dense model has one."""
    (inner,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return inner


def allocate_state(optimizer: Any) -> None:
    """Give an Adam the state that it would make in its first step, so that a checkpoint can be written and
    loaded at any time. torch's counts steps for each parameter, Transformer Engine's and Apex's for each
    group."""
    for part in getattr(optimizer, "sub_optimizers", [optimizer]):  # Megatron's offloading one has several
        for group in part.param_groups:
            for p in group["params"]:
                if not part.state[p]:
                    _allocate_state_of(part, p)
            if not isinstance(part, torch.optim.Adam):
                group.setdefault("step", 0)
    if hasattr(optimizer, "sub_optimizers"):
        optimizer._sync_sub_optimizers_state_to_hdo()


def _allocate_state_of(optimizer: Any, p: Tensor) -> None:
    if hasattr(optimizer, "initialize_state"):  # Transformer Engine's, whose state has precisions of its own
        remainders = getattr(optimizer, "store_param_remainders", False) and p.dtype == torch.bfloat16
        optimizer.initialize_state(p, remainders)
        return
    optimizer.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    if isinstance(optimizer, torch.optim.Adam):
        optimizer.state[p]["step"] = torch.zeros((), dtype=torch.float32)


class Schedule(OptimizerParamScheduler):
    """Megatron's, with a warm-up whose every update moves the weights.

    Megatron's schedule counts the updates before this one, so its warm-up of n updates goes from 0 to
    lr (n - 1) / n. Here update k of the warm-up has lr k / n. Later updates have Megatron's learning rates.
    """

    def get_lr(self, param_group: dict[str, Any]) -> float:
        if self.num_steps < self.lr_warmup_steps:
            return param_group.get("max_lr", self.max_lr) * (self.num_steps + 1) / self.lr_warmup_steps
        return super().get_lr(param_group)


def _build_scheduler(optimizer: Any, c: Any, total_updates: int) -> Schedule:
    return Schedule(
        optimizer,
        init_lr=c.lr,
        max_lr=c.lr,
        min_lr=c.min_lr,
        lr_warmup_steps=c.warmup_steps,
        lr_decay_steps=max(total_updates, c.warmup_steps + 1),
        lr_decay_style=c.decay_style,
        start_wd=c.weight_decay,
        end_wd=c.weight_decay,
        wd_incr_steps=total_updates,
        wd_incr_style="constant",
        # The config speaks, also in a resumed run: it may have been made longer.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
