"""The settings of each algorithm, with its source's defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from megatron_dgpo.config.section import Count, NonNegative, Positive, Probability, Section

Aggregation = Literal["sequence_mean", "token_mean", "sequence_sum", "fixed_length"]
CreditName = Literal["uniform", "distribution"]


class CreditConfig(Section):
    """How a response's advantage is spread over its tokens; the same keys in every algorithm."""

    credit: CreditName = "uniform"
    """uniform: every token gets the response's advantage. distribution: DGPO's weights (Eq. 6)."""
    tau: Positive | Literal["auto"] = 1.0
    """Temperature of the softmax that spreads credit (Eq. 6); small concentrates it. "auto": found for each
    rollout batch, so that effective_fraction holds; with credit_timing = "rollout" only."""
    tau_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How tau goes to tau_final over the run."""
    tau_final: Positive = 1.0
    """Where the schedule of tau ends."""
    effective_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """With tau = "auto", the mean over responses of (sum w)^2 / (T sum w^2); 1 would be uniform credit."""
    kappa: NonNegative = 1.0
    """Exponent of the entropy gate; 0 turns it off."""
    kappa_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How kappa goes to kappa_final over the run."""
    kappa_final: NonNegative = 1.0
    """Where the schedule of kappa ends."""
    entropy_normalization: Literal["log_vocab", "none"] = "log_vocab"
    """Divide the entropy by ln V, or take it in nats."""
    distance: Literal["hellinger", "reverse_kl"] = "hellinger"
    """Between policy and reference: squared Hellinger (Eq. 2), or reverse KL for the ablation."""
    credit_timing: Literal["rollout", "update"] = "rollout"
    """Take distance and entropy once per rollout batch, or under the current policy at each update."""


class PolicyGradientConfig(CreditConfig):
    """What every algorithm has; each has its source's defaults."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: Positive = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    advantage_eps: Positive = 1e-6
    """Added to the group's standard deviation (Eq. 1)."""
    normalize_by_std: bool = True
    """Divide the advantage by the group's standard deviation."""
    aggregation: Aggregation = "sequence_mean"
    """Mean over responses of the mean over tokens (Eq. 7), one mean over all tokens, the mean over responses
    of their sums, or of their sums over rollout.max_new_tokens."""
    tis_cap: NonNegative = 0.0
    """Weigh tokens by trainer over engine probability, truncated at this cap (at least 1); 0 turns it off."""
    sequence_mask_cap: NonNegative = 0.0
    """Leave out responses whose tokens' trainer over engine probability has a geometric mean above this cap
    (at least 1) or below its inverse; 0 turns it off."""


class DGPOConfig(PolicyGradientConfig):
    name: Literal["dgpo"] = "dgpo"
    """The algorithm: dgpo, grpo, dapo, dapo_dgpo (dapo with DGPO's credit), gspo, dr_grpo, reinforce, ppo, or
    "package.module:Class" of your own."""
    credit: CreditName = "distribution"
    """DGPO's weights, or uniform ones."""


class GRPOConfig(PolicyGradientConfig):
    name: Literal["grpo"] = "grpo"
    """See dgpo."""
    kl_coef: NonNegative = 0.0
    """Weight of the k3 estimate of KL(policy || reference): 0, as the other algorithms have no such term and
    DGPO's comparison is about credit alone; DeepSeekMath, the source, has 0.04."""


class DAPOConfig(PolicyGradientConfig):
    name: Literal["dapo"] = "dapo"
    """See dgpo."""
    clip_high: Positive = 0.28
    """The ratio is clipped above at 1 + clip_high."""
    aggregation: Aggregation = "token_mean"
    """One mean over all tokens."""


class DAPODGPOConfig(DAPOConfig):
    name: Literal["dapo_dgpo"] = "dapo_dgpo"  # type: ignore[assignment]
    """See dgpo."""
    credit: CreditName = "distribution"
    """DGPO's weights, or uniform ones."""


class GSPOConfig(PolicyGradientConfig):
    name: Literal["gspo"] = "gspo"
    """See dgpo."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 3e-4
    """The sequence's ratio is clipped below at 1 - clip_low."""
    clip_high: Positive = 4e-4
    """The sequence's ratio is clipped above at 1 + clip_high."""


class DrGRPOConfig(PolicyGradientConfig):
    name: Literal["dr_grpo"] = "dr_grpo"
    """See dgpo."""
    normalize_by_std: bool = False
    """Divide the advantage by the group's standard deviation."""
    aggregation: Aggregation = "fixed_length"
    """Sums over tokens, over rollout.max_new_tokens."""


class ReinforceConfig(PolicyGradientConfig):
    name: Literal["reinforce"] = "reinforce"
    """See dgpo."""
    aggregation: Aggregation = "sequence_sum"
    """The mean over responses of sums over tokens."""


class PPOConfig(PolicyGradientConfig):
    name: Literal["ppo"] = "ppo"
    """See dgpo."""
    aggregation: Aggregation = "token_mean"
    """One mean over all tokens."""
    gamma: Probability = 1.0
    """Discount of a token's future reward."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Of generalised advantage estimation: 1 takes whole returns, 0 one-step differences."""
    value_clip: NonNegative = 0.2
    """How far a value may move in one rollout batch; 0 turns the clip off."""
    critic_lr: Positive = 1e-5
    """Highest learning rate of the value model; the rest of its optimizer is the policy's."""
    critic_warmup_steps: Count = 0
    """Steps at the start that train the value model alone."""


class CustomConfig(PolicyGradientConfig):
    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """The import path of a subclass of megatron_dgpo.algorithms.Algorithm."""
    options: dict[str, Any] = {}
    """Settings of an algorithm of your own, which it reads as config.options."""


def _algorithm_tag(given: Any) -> str:
    name = given.get("name") if isinstance(given, dict) else getattr(given, "name", None)
    return "custom" if isinstance(name, str) and ":" in name else str(name)


AlgorithmConfig = Annotated[
    Annotated[DGPOConfig, Tag("dgpo")]
    | Annotated[GRPOConfig, Tag("grpo")]
    | Annotated[DAPOConfig, Tag("dapo")]
    | Annotated[DAPODGPOConfig, Tag("dapo_dgpo")]
    | Annotated[GSPOConfig, Tag("gspo")]
    | Annotated[DrGRPOConfig, Tag("dr_grpo")]
    | Annotated[ReinforceConfig, Tag("reinforce")]
    | Annotated[PPOConfig, Tag("ppo")]
    | Annotated[CustomConfig, Tag("custom")],
    Discriminator(_algorithm_tag),
]

OVERLONG_WEIGHT = 0.5
"""DAPO rewards answers with 1 or -1 (Eq. 7, arXiv 2503.14476) and takes up to 1 off the overlong ones
(Eq. 13); rewards here are 1 or 0. Half the punishment keeps the proportion: the source's sum is
2 (x + p / 2) - 1 with x in {0, 1}, and the group's normalisation takes shift and factor out."""

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    name: {
        "rollout": {"dynamic_sampling": True},
        "reward": {"terms": [{"name": "overlong", "weight": OVERLONG_WEIGHT}]},
    }
    for name in ("dapo", "dapo_dgpo")
}
"""Defaults that an algorithm brings for other sections."""
