"""What the tables compare: settings of a run by name, and how many seeds each gets."""

from __future__ import annotations

from dataclasses import dataclass

DGPO = "dgpo"
GRPO = "grpo"
DAPO = "dapo"
PPO = "ppo"
TUNED = "tuned"
"""DGPO at the tau that did best on the tuning prompts: one of TAUS."""

TAUS = ("0.02", "0.05", "0.1", "0.5", "1.0")
KAPPAS = ("0.0", "1.0", "2.0")
FRACTION = "0.8"
"""The effective token fraction at which the matched ablations run, whatever tau that takes."""

_MATCHED = ("--algorithm.tau", "auto", "--algorithm.effective_fraction", FRACTION)
_REVERSE_KL = ("--algorithm.distance", "reverse_kl")


def tau_arm(tau: str) -> str:
    return DGPO if tau == "1.0" else f"tau={tau}"


def kappa_arm(kappa: str, *, matched: bool = False) -> str:
    if kappa == "1.0":
        return "matched" if matched else DGPO
    return f"{'matched ' if matched else ''}kappa={kappa}"


ARMS: dict[str, tuple[str, ...]] = {
    GRPO: ("--algorithm.name", "grpo"),
    # Its checkpoints are the policy at an equal number of samples.
    DAPO: ("--algorithm.name", "dapo", "--checkpoint.every", "1", "--checkpoint.keep_last", "0"),
    DGPO: (),  # the paper's: tau = 1, kappa = 1
    **{tau_arm(tau): ("--algorithm.tau", tau) for tau in TAUS[:-1]},
    **{kappa_arm(k): ("--algorithm.kappa", k) for k in KAPPAS if k != "1.0"},
    "reverse_kl": _REVERSE_KL,
    "matched": _MATCHED,
    **{kappa_arm(k, matched=True): (*_MATCHED, "--algorithm.kappa", k) for k in KAPPAS if k != "1.0"},
    "matched reverse_kl": (*_MATCHED, *_REVERSE_KL),
    PPO: ("--algorithm.name", "ppo", "--algorithm.critic_lr", "1e-3"),
}
"""Words for the command line of `megatron_dgpo.train`, beside examples/quickstart/dgpo.toml."""

MAIN = (GRPO, DGPO, DAPO)
ABLATIONS = tuple(name for name in ARMS if name != DAPO)
TIMED = (GRPO, DGPO, PPO)


@dataclass(frozen=True)
class Run:
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.replace(' ', '_')}-{self.seed}"


@dataclass(frozen=True)
class Scale:
    """How large the replication is. Seeds of the main comparison and of the ablations, where tau is
    tuned, are different ones."""

    cold_starts: int = 3
    main_seeds: int = 9
    ablation_seeds: int = 5
    critic_seeds: int = 3
    """Of PPO, which is in no comparison of scores: its critic and its cost are shown."""
    steps: int = 30
    samples_per_problem: int = 32
    timed_rounds: int = 3
    timed_steps: int = 8
    sft_words: tuple[str, ...] = ()
    prompts_per_step: int = 32
    samples_per_prompt: int = 8

    @property
    def samples(self) -> int:
        """That a run without dynamic sampling trains on: the measure of "equal samples"."""
        return self.steps * self.prompts_per_step * self.samples_per_prompt

    @property
    def seeds(self) -> range:
        return range(1, 1 + self.main_seeds)

    @property
    def tuning_seeds(self) -> range:
        return range(101, 101 + self.ablation_seeds)

    @property
    def critics(self) -> range:
        return self.tuning_seeds[: self.critic_seeds]

    def cold_start(self, seed: int) -> int:
        """The cold start of a seed: each has nearly the same number of seeds."""
        return seed % self.cold_starts + 1

    def first_runs(self) -> list[Run]:
        """Everything that does not depend on the tau that is tuned in it."""
        main = [Run(arm, seed) for seed in self.seeds for arm in MAIN]
        others = [Run(arm, seed) for seed in self.tuning_seeds for arm in ABLATIONS]
        return main + [run for run in others if run.arm != PPO or run.seed in self.critics]

    def tuned_runs(self, tau: str) -> list[Run]:
        return [Run(tau_arm(tau), seed) for seed in self.seeds]


FULL = Scale()
QUICK = Scale(
    cold_starts=1,
    main_seeds=2,
    ablation_seeds=1,
    steps=4,
    samples_per_problem=4,
    timed_rounds=1,
    timed_steps=4,
    sft_words=("--train.steps", "500"),
)
