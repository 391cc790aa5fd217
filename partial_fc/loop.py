"""The steps of a run, with what comes between them: evaluation, commits, signals, divergence."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch import nn

from partial_fc.build import Place
from partial_fc.config import Config
from partial_fc.council import Council
from partial_fc.data import SampleStream
from partial_fc.errors import NonFiniteError
from partial_fc.evaluate import VerificationResult
from partial_fc.figures import Figures, ReadStep
from partial_fc.journal import Journal
from partial_fc.keeper import DIVERGED, SAVE, STOP, Keeper, Kept
from partial_fc.metrics import TrainingMetrics
from partial_fc.preemption import Preemption
from partial_fc.run_folder import Start
from partial_fc.training_step import TrainingStep
from partial_fc.verify import describe, evaluate_sets
from partial_fc.watchdog import Watchdog


class Course(NamedTuple):
    """What a run is made of, and how far it goes.

    Attributes:
        config: the configuration.
        place: this process.
        start: its folder, and what it goes on from.
        steps: optimizer steps of the whole run.
        stream: this rank's batches.
        backbone: the same on every rank.
        training_step: makes the steps.
        set_learning_rates: sets those of the step to come, and returns them by group.
        sets: verification files by name.
        council: how ranks agree.
        watchdog: told of what the run does.
        kept: where it stands, beside tensors.
    """

    config: Config
    place: Place
    start: Start
    steps: int
    stream: SampleStream
    backbone: nn.Module
    training_step: TrainingStep
    set_learning_rates: Callable[[], dict[str, float]]
    sets: dict[str, Path]
    council: Council
    watchdog: Watchdog
    kept: Kept


class Loop:
    """Runs the steps.

    Args:
        course: of the run.
        figures: what reads and tells their outcomes.
        journal: for lines.
        metrics: for evaluations.
        keeper: of commits.
        preemption: tells of signals.
    """

    def __init__(
        self,
        course: Course,
        figures: Figures,
        journal: Journal,
        metrics: TrainingMetrics,
        keeper: Keeper,
        preemption: Preemption,
    ) -> None:
        self._course, self._figures, self._journal, self._metrics = course, figures, journal, metrics
        self._keeper, self._preemption = keeper, preemption
        self._config, self._progress = course.config, course.kept.progress
        self._diverged: str | None = None

    def run(self) -> bool:
        """Train to the last step, or until a signal; whether it was the last step."""
        course, progress, figures = self._course, self._progress, self._figures
        council, every = course.council, self._config.evaluate.every_steps
        figures.restart_clock(progress.step)
        while True:
            if progress.step >= course.steps:
                asked = council.drain()
                if DIVERGED not in asked:
                    # After a signal in the last step the next start does what is left.
                    return STOP not in asked
                self._go_back()
                continue
            rates = course.set_learning_rates()
            last = progress.step + 1 == course.steps
            logs = (progress.step + 1) % self._config.train.log_every == 0 or last
            figures.add(progress.step, course.training_step.run(progress.step, norms=logs))
            progress.step += 1
            progress.samples, progress.accuracy = course.stream.position, None
            self._journal.advance(progress.step)
            evaluates = every is not None and progress.step % every == 0 and not last
            # Reading is where a GPU synchronises, so it happens at such steps only.
            if course.place.device.type == "cpu" or logs or evaluates or self._keeper.due:
                self._read(rates)
            if logs:
                course.start.status.write("running", progress.step)
                figures.log(progress.step, progress.samples, rates, last=last)
            if evaluates:
                self.evaluate()
            if self._preemption.requested is not None:
                council.ask(STOP)
            asked = council.exchange()
            if DIVERGED in asked:
                self._go_back()
                continue
            if asked and figures.unread:
                self._read(rates)
            if SAVE in asked:
                self._keeper.owe()
            if not last:
                self._keeper.after_step()
            if STOP in asked:
                council.drain()
                return False

    def evaluate(self) -> dict[str, VerificationResult]:
        """Verification of the state as it is."""
        course, step = self._course, self._progress.step
        beat, begin = course.watchdog.beat, time.perf_counter()
        beat("evaluation", step)
        results = evaluate_sets(
            self._config,
            course.backbone,
            course.sets,
            course.place,
            course.training_step.precision,
            lambda: beat("evaluation"),
        )
        seconds = time.perf_counter() - begin
        for name, result in results.items():
            self._journal.record("evaluation", step, set=name, evaluation_seconds=seconds, **result.summary())
            self._journal.say(f"step {step}/{course.steps}  {describe(name, result)}")
        if results:
            self._metrics.record_evaluation({name: result.accuracy for name, result in results.items()}, seconds)
            self._progress.accuracy = statistics.fmean(result.accuracy for result in results.values())
        self._figures.restart_clock(self._progress.step)
        return results

    def _read(self, rates: dict[str, float]) -> None:
        """Read what the steps since the last call came to, and look whether the run goes astray."""
        kept = self._course.kept
        for step in self._figures.read(rates, self._progress.samples):
            overflowed = step.outcome.overflowed and kept.scale.scale > 1
            if not step.applied and not step.outcome.overflowed:
                self._tell_skipped(step)
            # An overflow in fp16 is met by a lower scale, and is no sign of a divergence until that can't fall.
            reason = kept.watch.see(step.loss if step.applied or overflowed else None)
            if reason is not None:
                self._diverged = self._diverged or f"step {step.step + 1}: {reason}"
                self._course.council.ask(DIVERGED)

    def _tell_skipped(self, step: ReadStep) -> None:
        """Name the samples of a step without an update, those of all ranks; all are here."""
        number, outcome = step.step + 1, step.outcome
        reason = outcome.reason or "the gradient of the backbone isn't finite"
        if self._config.train.nonfinite == "stop":
            raise NonFiniteError(f"step {number}: {reason}")
        ids = [outcome.sample_ids.tolist()] * self._course.place.world_size
        if dist.is_initialized():
            dist.all_gather_object(ids, ids[0])
        samples = [sample for of_rank in ids for sample in of_rank]
        self._journal.record("skipped", number, reason=reason, sample_ids=samples)
        self._journal.warn(
            f"step {number} is skipped: {reason} (metrics.jsonl names the {len(samples)} samples: {_few(samples)})"
        )

    def _go_back(self) -> None:
        """After a divergence: to the last commit, or an end."""
        reason = self._diverged or f"step {self._progress.step}: another rank's loss"
        if self._config.train.on_divergence == "stop":
            raise NonFiniteError(
                f"the run diverged ({reason}): lower optim.learning_rate, or set train.on_divergence=rollback; its "
                f"last commit is in {self._course.start.commits}"
            )
        self._journal.warn(f"the run diverged ({reason})")
        self._keeper.roll_back()
        self._course.stream.seek(self._progress.samples)
        self._diverged = None
        self._figures.drop()
        self._figures.restart_clock(self._progress.step)


def _few(samples: Sequence[int], count: int = 8) -> str:
    text = ", ".join(map(str, samples[:count]))
    return f"{text}, ..." if len(samples) > count else text
