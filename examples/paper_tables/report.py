"""Writes RESULTS.md, figure3.png and results.json from what the runs gave."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from arms import (
    DAPO,
    DGPO,
    FRACTION,
    GRPO,
    KAPPAS,
    PPO,
    TAUS,
    Scale,
    kappa_arm,
    tau_arm,
)
from experiments import HELDOUT, Experiments
from results import DAPO_EQUAL, Estimate, Outcome, by_seed, estimate, holm, paired, read, timings, to_json

from megatron_dgpo.observe.machine import describe_machine

ALPHA = 0.05
Rows = Sequence[tuple[str, str]]
"""Title and arm of each row."""


def write(experiments: Experiments) -> Path:
    """The three files; returns RESULTS.md's path."""
    outcomes, tau = read(experiments), experiments.tuned_tau()
    times, machine = timings(experiments), describe_machine()
    folder = experiments.folder
    record = {"machine": machine, "tuned_tau": tau, "outcomes": to_json(outcomes), "timings": times}
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    figure(folder / "figure3.png", outcomes, experiments.scale, tau)
    parts = [
        heading(experiments.scale, machine),
        findings(outcomes, experiments.scale, times),
        *main_tables(outcomes, experiments.scale, tau),
        *ablation_tables(outcomes, experiments.scale, tau),
        table6(times),
        critic(outcomes),
    ]
    path = folder / "RESULTS.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def heading(scale: Scale, machine: dict[str, Any]) -> str:
    k, made = scale.samples_per_problem, machine["versions"]
    return f"""# The paper's tables at a laptop's scale

{machine["date"]}, {machine["device"]}, {machine["cores"]} cores, torch {made["torch"]}, megatron-core
{made["megatron-core"]}. Written by `bash examples/paper_tables/run.sh`.

The quick start's task and model (151k parameters), {scale.steps} steps of {scale.prompts_per_step} prompts x
{scale.samples_per_prompt} samples, 4 updates a step. Scores are on reporting prompts: {HELDOUT // 2} for each
cold start, {k} samples each. Avg@{k} is at temperature 1.0 and top-p 1.0, as in training, and decides. The
paper's protocol, top-p 0.7, comes after it (Avg, Cons, Pass); there this task is nearly solved. The main
comparison has {scale.main_seeds} seeds over {scale.cold_starts} cold starts. The ablations have
{scale.ablation_seeds} other seeds; tau is tuned with those, on prompts that no score here is from.
What is not named in a table is the algorithm's default: DAPO has its clip, its mean over all tokens and its
overlong term too.

Intervals are 95% (Student's t over seeds, uncorrected), so they hold for these cold starts and prompts.
Differences are paired by seed and cold start. `p (Holm)` is the paired t-test's, corrected for the tests of
its column. Where it is below {ALPHA}, the verdict says better or worse. Otherwise it is a tie: not told
apart, which is no proof of being equal; the interval says how large a difference could still be."""


# --- what replicates ------------------------------------------------------------------------------------


def findings(outcomes: Sequence[Outcome], scale: Scale, times: dict[str, list[dict[str, float]]]) -> str:
    """The paper's claims beside what came out here: yes, no (the opposite), or not told apart."""
    main, others = list(scale.seeds), list(scale.tuning_seeds)
    claims = [
        ("DGPO is better than GRPO", DGPO, GRPO, main),
        ("DAPO is better than GRPO, after as many steps", DAPO, GRPO, main),
        ("DAPO is better than GRPO, after as many samples", DAPO_EQUAL, GRPO, main),
        ("DGPO is better than DAPO, after as many steps", DGPO, DAPO, main),
        ("DGPO is better than DAPO, after as many samples", DGPO, DAPO_EQUAL, main),
        ("the entropy gate helps (tau = 1)", DGPO, kappa_arm("0.0"), others),
        ("the entropy gate helps (equal concentration)", "matched", kappa_arm("0.0", matched=True), others),
        ("Hellinger is better than reverse KL (tau = 1)", DGPO, "reverse_kl", others),
        (
            "Hellinger is better than reverse KL (equal concentration)",
            "matched",
            "matched reverse_kl",
            others,
        ),
        ("tau = 1 is better than tau = 0.1", DGPO, tau_arm("0.1"), others),
    ]
    tests = [paired(outcomes, better, worse, seeds) for _, better, worse, seeds in claims]
    corrected = holm([test.p for test in tests])
    says = {"better": "yes", "worse": "no, the opposite", "tie": "not told apart"}
    body = []
    for (claim, *_), test, p in zip(claims, tests, corrected, strict=True):
        verdict = _verdict(test, p)
        body.append([claim, with_interval(test, sign="+"), _p(p), says.get(verdict, verdict)])
    ratios = [d["time/step"] / g["time/step"] for d, g in zip(times[DGPO], times[GRPO], strict=True)]
    body.append(["DGPO takes 1.04 of GRPO's time a step (3.6% more)", _spread(ratios), "", ""])
    head = [
        "the paper's claim",
        f"here (difference in Avg@{scale.samples_per_problem})",
        "p (Holm)",
        "replicates",
    ]
    return f"## What replicates at this scale\n\n{markdown(head, body)}"


# --- tables ---------------------------------------------------------------------------------------------


def main_tables(outcomes: Sequence[Outcome], scale: Scale, tau: str) -> list[str]:
    share = fmean(o.samples_drawn for o in outcomes if o.arm == DAPO_EQUAL) / scale.samples
    rows = [
        ("GRPO", GRPO),
        ("DAPO, as many steps", DAPO),
        (f"DAPO, as many samples ({share:.2f} x)", DAPO_EQUAL),
        ("DGPO, the paper's tau = 1", DGPO),
    ]
    if tau != "1.0":
        rows.append((f"DGPO, tau = {tau} (tuned)", tau_arm(tau)))
    seeds = list(scale.seeds)
    title = f"## Tables 1 and 2: GRPO, DAPO and DGPO\n\n{scale.main_seeds} seeds."
    compared = comparison(outcomes, rows, [GRPO, DAPO], seeds, scale.samples_per_problem)
    return [f"{title}\n\n{compared}", cold_starts(outcomes, rows, scale), share_of_samples(outcomes, scale)]


def share_of_samples(outcomes: Sequence[Outcome], scale: Scale) -> str:
    drawn = [o.samples_drawn / scale.samples for o in outcomes if o.arm == DAPO]
    text = f"DAPO drew {fmean(drawn):.2f} times the samples of the others in as many steps"
    return f"{text}. ![curves](figure3.png)\n\nFigure 3: tuning prompts, mean and 95% band over seeds."


def cold_starts(outcomes: Sequence[Outcome], rows: Rows, scale: Scale) -> str:
    """The same scores by cold start: whether one of them makes the difference."""
    head = ["", *(f"cold start {i}" for i in range(1, 1 + scale.cold_starts))]
    body = []
    for title, arm in rows:
        cells = []
        for index in range(1, 1 + scale.cold_starts):
            of = [
                o.scores["avg"]
                for o in outcomes
                if o.arm == arm and o.cold_start == index and o.seed in scale.seeds
            ]
            cells.append(f"{fmean(of):.3f}" if of else "-")
        body.append([title, *cells])
    return f"By cold start, Avg@{scale.samples_per_problem}:\n\n{markdown(head, body)}"


def ablation_tables(outcomes: Sequence[Outcome], scale: Scale, tau: str) -> list[str]:
    seeds, k = list(scale.tuning_seeds), scale.samples_per_problem
    grpo = ("GRPO", GRPO)
    gates = [grpo, *_gate_rows(matched=False)]
    matched_gates = [grpo, *_gate_rows(matched=True)]
    taus = [grpo, *((f"tau = {t}", tau_arm(t)) for t in TAUS)]
    kappas = [grpo, *((f"kappa = {x}", kappa_arm(x)) for x in KAPPAS)]
    matched_kappas = [grpo, *((f"kappa = {x}", kappa_arm(x, matched=True)) for x in KAPPAS)]
    n, matched = f"{scale.ablation_seeds} seeds", f"tau such that the effective token fraction is {FRACTION}:"
    return [
        f"## Table 3: gate and distance\n\n{n}. The paper's settings (tau = 1):",
        comparison(outcomes, gates, [GRPO, DGPO], seeds, k),
        matched,
        comparison(outcomes, matched_gates, [GRPO, "matched"], seeds, k),
        f"## Table 4: tau\n\n{n}, kappa = 1. The best on the tuning prompts is tau = {tau}; it was chosen"
        " among these runs, so the main comparison judges it.",
        comparison(outcomes, taus, [GRPO], seeds, k),
        f"## Table 5: kappa\n\n{n}, tau = 1:",
        comparison(outcomes, kappas, [GRPO, DGPO], seeds, k),
        matched,
        comparison(outcomes, matched_kappas, [GRPO, "matched"], seeds, k),
    ]


def _gate_rows(*, matched: bool) -> Rows:
    return [
        ("DGPO", kappa_arm("1.0", matched=matched)),
        ("without the entropy gate", kappa_arm("0.0", matched=matched)),
        ("reverse KL", "matched reverse_kl" if matched else "reverse_kl"),
    ]


def comparison(
    outcomes: Sequence[Outcome], rows: Rows, bases: Sequence[str], seeds: Sequence[int], k: int
) -> str:
    """Scores of each arm and its paired difference to each of `bases` on Avg@k, with verdicts."""
    head = ["", f"Avg@{k}", *(f"{name}@{k}, top-p 0.7" for name in ("Avg", "Cons", "Pass"))]
    head.append("effective fraction")
    body = []
    for title, arm in rows:
        names = ("avg", "paper_avg", "cons", "pass")
        scores = [estimate([by_seed(outcomes, arm, name)[i] for i in seeds]) for name in names]
        plain = (f"{x.mean:.3f}" for x in scores[1:])
        body.append([title, with_interval(scores[0]), *plain, _fraction(outcomes, arm, seeds)])
    titles = {arm: title for title, arm in rows}
    for base in bases:
        head += [f"Avg@{k} - {titles[base]}", "p (Holm)", "verdict"]
        tests = {arm: paired(outcomes, arm, base, seeds) for _, arm in rows if arm != base}
        corrected = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
        for cells, (_, arm) in zip(body, rows, strict=True):
            if arm == base:
                cells += ["", "", ""]
            else:
                test, p = tests[arm], corrected[arm]
                cells += [with_interval(test, sign="+"), _p(p), _verdict(test, p)]
    return markdown(head, body)


def _fraction(outcomes: Sequence[Outcome], arm: str, seeds: Sequence[int]) -> str:
    name = "credit_effective_fraction"
    of = [o.means[name] for o in outcomes if o.arm == arm and o.seed in seeds and name in o.means]
    return f"{fmean(of):.3f}" if of else "1"


def _verdict(test: Estimate, p: float) -> str:
    if np.isnan(p):
        return "too few seeds"
    return "tie" if p >= ALPHA else ("better" if test.mean > 0 else "worse")


def table6(times: dict[str, list[dict[str, float]]]) -> str:
    """Medians over rounds; ratios between runs of the same round."""
    names = ("time/generate", "time/prepare", "time/update", "time/step")
    head = ["", "tokens/s", "step time / GRPO's", *(f"{name.removeprefix('time/')} s" for name in names)]
    body = []
    for arm in (GRPO, DGPO, PPO):
        rows = times[arm]
        ratios = [row["time/step"] / g["time/step"] for row, g in zip(rows, times[GRPO], strict=True)]
        cells = [f"{median(r['tokens_per_second'] for r in rows):.0f}", _spread(ratios)]
        cells += [f"{median(r[name] for r in rows):.2f}" for name in names]
        cells.append(f"{median(r['memory'] for r in rows) / 2**20:.0f}")
        body.append([arm.upper(), *cells])
    rounds = f"""## Table 6: throughput and memory

{len(times[GRPO])} rounds with nothing else running, one process; a ratio is the median over rounds (least to
most). Peak memory is the process's resident set, most of it libraries at this size of model; a larger
model's steps, and the loss's own memory, are in tools/bench/README.md.
"""
    return f"{rounds}\n{markdown([*head, 'peak MiB'], body)}"


def critic(outcomes: Sequence[Outcome]) -> str:
    """How well PPO's critic explains the returns, by tenths of the run."""
    curves = [o.explained_variance for o in outcomes if o.arm == PPO]
    parts = [np.array_split(np.asarray(curve), min(5, len(curve))) for curve in curves]
    means = [estimate([float(run[i].mean()) for run in parts]) for i in range(len(parts[0]))]
    head = ["part of the run", *(f"{i + 1} of {len(means)}" for i in range(len(means)))]
    body = [["explained variance", *(with_interval(x) for x in means)]]
    score = estimate([o.scores["avg"] for o in outcomes if o.arm == PPO])
    return f"PPO's critic ({len(curves)} seeds; PPO scores {with_interval(score)}):\n\n{markdown(head, body)}"


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _p(p: float) -> str:
    return "-" if np.isnan(p) else (f"{p:.3f}" if p >= 0.001 else "< .001")


def with_interval(value: Estimate, *, sign: str = "") -> str:
    if np.isnan(value.low):
        return f"{value.mean:{sign}.3f}"
    return f"{value.mean:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# --- figure ---------------------------------------------------------------------------------------------


def figure(path: Path, outcomes: Sequence[Outcome], scale: Scale, tau: str) -> None:
    """Held-out accuracy over steps and over samples drawn: means and bands over seeds."""
    shown = {GRPO: "GRPO", DAPO: "DAPO", DGPO: "DGPO, tau = 1"}
    if tau != "1.0":
        shown[tau_arm(tau)] = f"DGPO, tau = {tau}"
    drawing, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for arm, title in shown.items():
        curves = [np.asarray(o.curve) for o in outcomes if o.arm == arm and o.seed in scale.seeds]
        scores = np.stack([curve[:, 2] for curve in curves])
        points = [estimate(column.tolist()) for column in scores.T]
        for axis, column in zip(axes, (0, 1), strict=True):
            x = np.mean([curve[:, column] for curve in curves], axis=0)
            (line,) = axis.plot(x, [p.mean for p in points], label=title, linewidth=1.5)
            axis.fill_between(
                x, [p.low for p in points], [p.high for p in points], color=line.get_color(), alpha=0.15
            )
    for axis, label in zip(axes, ("steps", "samples drawn"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("avg@4 on the tuning prompts")
    axes[0].legend(frameon=False)
    drawing.savefig(path, dpi=130)
    plt.close(drawing)
