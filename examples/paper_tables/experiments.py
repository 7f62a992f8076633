"""Runs every experiment of the tables that is not there yet: cold starts, training, evaluation, timing."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from arms import ARMS, DAPO, TAUS, TIMED, Run, Scale, tau_arm

from megatron_dgpo.observe.console import Console

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
sys.path += [str(ROOT / "tools"), str(QUICKSTART)]
RECIPE = (QUICKSTART / "dgpo.toml", Path(__file__).with_name("run.toml"))
HELDOUT = 256
"""Problems that no training prompt is among: the first half for tuning, the rest for reporting."""
EVALUATIONS = 5
"""Of a run on the tuning prompts, beside the one at its start."""
TIMEOUT_SECONDS = 3600.0
REPORTING, EQUAL_SAMPLES = "reporting", "equal_samples"
"""What is scored: a run's policy, and DAPO's when it had drawn as many samples as the others."""
TOP_PS = (0.7, 1.0)
"""The paper's, at which this task is nearly solved, and the one that the policy is trained with."""
PRELOAD = [
    *("megatron_dgpo.coldstart", "megatron_dgpo.trainer", "torch._dynamo"),
    *("matplotlib.pyplot", "scipy.stats"),
]
"""Imported once by the server that forks the runs: it would take a fifth of each one's time."""


class Experiments:
    """All runs of a scale in one folder; whatever is complete there is not run again.

    Raises RuntimeError naming the log of the first command that failed.
    """

    def __init__(self, folder: Path, scale: Scale, *, jobs: int) -> None:
        self.folder, self.scale, self.jobs = folder, scale, jobs

    def all(self) -> None:
        cold = range(1, 1 + self.scale.cold_starts)
        self._parallel("cold starts", [(str(i), lambda i=i: self.make_cold_start(i)) for i in cold])
        self.train("runs", self.scale.first_runs())
        self.train(f"tau = {self.tuned_tau()}, tuned", self.scale.tuned_runs(self.tuned_tau()))
        self._parallel("timing", list(self._timings()), jobs=1)

    def train(self, what: str, runs: Iterable[Run]) -> None:
        self._parallel(what, [(run.name, lambda run=run: self.make_run(run)) for run in runs])

    # --- where things are -------------------------------------------------------------------------

    def run_folder(self, run: Run) -> Path:
        return self.folder / "runs" / run.name

    def timed_folder(self, arm: str, round_: int) -> Path:
        return self.folder / "timing" / f"{arm}-{round_}"

    def tuned_tau(self) -> str:
        """The tau with the best mean on the tuning prompts; the larger one of a tie."""
        return max(TAUS, key=lambda tau: (self._tuning_score(tau_arm(tau)), float(tau)))

    def _tuning_score(self, arm: str) -> float:
        scores = [last_evaluation(self.run_folder(Run(arm, seed))) for seed in self.scale.tuning_seeds]
        return sum(scores) / len(scores)

    # --- the commands -----------------------------------------------------------------------------

    def make_cold_start(self, index: int) -> None:
        folder = self.folder / f"coldstart{index}"
        data = folder / "data"
        if (folder / "done").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        if not data.exists():
            words = ["--out", str(data), "--seed", str(index), "--heldout-prompts", str(HELDOUT)]
            command("make_data", words, log)
        rows = (data / "heldout.jsonl").read_text().splitlines(keepends=True)
        (data / "tuning.jsonl").write_text("".join(rows[: HELDOUT // 2]))
        (data / "reporting.jsonl").write_text("".join(rows[HELDOUT // 2 :]))
        words = ["--model.path", str(data / "model"), "--data.train", json.dumps([str(data / "sft.jsonl")])]
        words += ["--run.seed", str(index), *self.scale.sft_words]
        words += ["--parallel.tensor_model_parallel_size", "1"]
        train("megatron_dgpo.sft", (QUICKSTART / "sft.toml",), folder / "sft", words, log)
        (folder / "done").touch()

    def make_run(self, run: Run) -> None:
        """Train, unless that is done, and score the policy; DAPO's also after as many samples.

        Raises RuntimeError where the run that is there had other settings.
        """
        folder, scale = self.run_folder(run), self.scale
        names = (REPORTING, EQUAL_SAMPLES) if run.arm == DAPO else (REPORTING,)
        words = ["--train.steps", str(scale.steps), "--run.seed", str(run.seed)]
        words += ["--evaluation.every", str(max(1, scale.steps // EVALUATIONS))]
        words += [*self._start(run.seed, evaluate=True), *ARMS[run.arm]]
        settings, trained = "".join(f"{word}\n" for word in words), folder / "trained"
        if trained.exists() and trained.read_text() != settings:
            raise RuntimeError(f"{folder} is a run of other settings; give another folder with --out")
        if all(scored(folder, name) for name in names):
            return
        if not trained.exists():
            train("megatron_dgpo.train", RECIPE, folder, words)
            trained.write_text(settings)
        models = {REPORTING: folder / "hf"}
        if run.arm == DAPO:
            step = step_at(folder, scale)
            models[EQUAL_SAMPLES] = folder / "checkpoints" / f"step_{step:08d}"
        self._score(models, run)

    def _start(self, seed: int, *, evaluate: bool) -> list[str]:
        cold = self.folder / f"coldstart{self.scale.cold_start(seed)}"
        heldout = [str(cold / "data" / "tuning.jsonl")] if evaluate else []
        words = ["--model.path", str(cold / "sft" / "hf"), "--evaluation.data", json.dumps(heldout)]
        return [*words, "--data.train", json.dumps([str(cold / "data" / "train.jsonl")])]

    def _score(self, models: dict[str, Path], run: Run) -> None:
        """Each model on the reporting prompts at each top-p."""
        data = self.folder / f"coldstart{self.scale.cold_start(run.seed)}" / "data" / "reporting.jsonl"
        common = ["--data", str(data), "--reward", "hash_answer", "--max-new-tokens", "96"]
        common += ["--k", str(self.scale.samples_per_problem), "--resamples", "1000"]
        folder = self.run_folder(run)
        for name, model in models.items():
            for top_p in TOP_PS:
                file = score_file(folder, name, top_p)
                if not file.exists():
                    words = [str(model), *common, "--top-p", str(top_p), "--json", str(file)]
                    command("evaluate", words, folder / "log.txt")

    def _timings(self) -> Iterable[tuple[str, Callable[[], None]]]:
        """Round by round, so that whatever slows the machine for a while meets every algorithm."""
        for round_ in range(self.scale.timed_rounds):
            for arm in TIMED:
                yield f"{arm} {round_}", lambda arm=arm, round_=round_: self._time(arm, round_)  # type: ignore[misc]

    def _time(self, arm: str, round_: int) -> None:
        folder = self.timed_folder(arm, round_)
        if (folder / "done").exists():
            return
        words = ["--train.steps", str(self.scale.timed_steps), "--run.seed", str(round_)]
        words += [*self._start(round_, evaluate=False), *ARMS[arm]]
        train("megatron_dgpo.train", RECIPE, folder, words)
        (folder / "done").touch()

    def _parallel(
        self, what: str, tasks: Sequence[tuple[str, Callable[[], None]]], *, jobs: int | None = None
    ) -> None:
        """Run the tasks, `jobs` at a time; after the first failure no other is begun."""
        console = Console(quiet=False, rank=0)
        with ThreadPoolExecutor(jobs or self.jobs) as pool, console.phase(what, len(tasks), "runs") as bar:
            names = {pool.submit(task): name for name, task in tasks}
            for future in as_completed(names):
                if future.exception() is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                future.result()
                bar.update()
                console.log(f"{what}: {names[future]} is done")


# --- commands ------------------------------------------------------------------------------------------


def train(
    module: str, recipe: Sequence[Path], folder: Path, words: Sequence[str], log: Path | None = None
) -> None:
    """A run of one process in `folder`, which goes on where it was ended."""
    folder.mkdir(parents=True, exist_ok=True)
    own = ["--resume", "--run.folder", str(folder)]
    command(module, [*map(str, recipe), *own, *words], log or folder / "log.txt")


def command(module: str, words: Sequence[str], log: Path) -> None:
    """A module's `main` with these words, in a process of its own that writes to `log`.

    Raises RuntimeError where it ends with another status than 0, or takes more than TIMEOUT_SECONDS.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_main, args=(module, list(words), log))
    process.start()
    process.join(TIMEOUT_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    if process.exitcode:
        raise RuntimeError(f"status {process.exitcode} of: {module} {' '.join(words)}\nits output: {log}")


def _main(module: str, words: list[str], log: Path) -> None:
    os.chdir(ROOT)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(file, descriptor)
    sys.exit(importlib.import_module(module).main(words))


# --- what a run left ------------------------------------------------------------------------------------


def score_file(folder: Path, name: str, top_p: float) -> Path:
    return folder / f"{name}-top_p_{top_p}.json"


def scored(folder: Path, name: str) -> bool:
    return all(score_file(folder, name, top_p).exists() for top_p in TOP_PS)


def metrics(folder: Path, phase: str) -> list[dict[str, float]]:
    with (folder / "metrics.jsonl").open() as file:
        return [row for row in map(json.loads, file) if row["phase"] == phase]


def last_evaluation(folder: Path) -> float:
    """avg@4 on the tuning prompts at a run's end."""
    return metrics(folder, "eval")[-1]["avg@4"]


def samples_by_step(folder: Path, scale: Scale) -> list[float]:
    """Samples that a run had drawn after each step, those that dynamic sampling left out among them."""
    total, found = 0.0, []
    for row in metrics(folder, "train"):
        total += row.get("groups_drawn", scale.prompts_per_step) * scale.samples_per_prompt
        found.append(total)
    return found


def step_at(folder: Path, scale: Scale) -> int:
    """The last checkpointed step of a DAPO run that had drawn no more samples than the others do."""
    drawn = samples_by_step(folder, scale)
    steps = [int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*")]
    return max(step for step in steps if step == min(steps) or drawn[step - 1] <= scale.samples)
