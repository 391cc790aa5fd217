"""What a run's steps come to: read from the device, counted in the metrics, and logged."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from partial_fc.data import SampleStream
from partial_fc.head import HeadStats, PartialFC
from partial_fc.journal import Journal
from partial_fc.loss_scale import LossScale
from partial_fc.metrics import GROUPS, NEAREST, PHASES, TrainingMetrics
from partial_fc.phases import PhaseTimer
from partial_fc.ranks import from_first
from partial_fc.training_step import Outcome, TrainingStep

# What reads all class centres may take one of so many parts of the time.
_SELDOM = 100
# Of the head's statistics, those that a line of the log has.
_OF_THE_HEAD = ("target_cosine", "support_vectors_per_sample", "sampled_classes")


class ReadStep(NamedTuple):
    """What came of a step, on the host.

    Attributes:
        step: its number, from 0.
        outcome: as it was on the device.
        loss: None where it wasn't finite.
        applied: whether there was an update.
    """

    step: int
    outcome: Outcome
    loss: float | None
    applied: bool


class Figures:
    """Reads the outcomes of steps where that costs no wait, and tells metrics and journal.

    Args:
        training_step: what makes the steps.
        head: this rank's shard.
        stream: this rank's batches.
        scale: the loss scale.
        timer: of the phases.
        journal: for the log's lines.
        metrics: for everything.
        batch_size: samples of a step over all ranks.
        samples_a_pass: of the data.
    """

    def __init__(
        self,
        training_step: TrainingStep,
        head: PartialFC,
        stream: SampleStream,
        scale: LossScale,
        timer: PhaseTimer,
        journal: Journal,
        metrics: TrainingMetrics,
        *,
        batch_size: int,
        samples_a_pass: int,
    ) -> None:
        self._training_step, self._head, self._stream = training_step, head, stream
        self._scale, self._timer, self._journal, self._metrics = scale, timer, journal, metrics
        self._batch_size, self._pass = batch_size, samples_a_pass
        # Steps whose outcome nobody has read from the device yet.
        self._unread: list[tuple[int, Outcome]] = []
        self._done = False
        self._last: dict[str, float | None] = {}
        self._seconds: list[dict[str, float]] = []
        self._logged, self._logged_at = 0, time.perf_counter()
        # Not before this time of the clock, at rank 0.
        self._looks_at = 0.0

    @property
    def unread(self) -> bool:
        """Whether there are steps that nobody has read."""
        return bool(self._unread)

    def add(self, step: int, outcome: Outcome) -> None:
        """Count a step, and take what it left, which is read later: on a GPU the log may be far away."""
        self._metrics.record_step(self._training_step.local_samples, step + 1)
        self._unread.append((step, outcome))

    def drop(self) -> None:
        """Forget what nobody has read: the run goes back."""
        self._unread = []

    def restart_clock(self, step: int) -> None:
        """The speed of the next log is that from here on.

        Args:
            step: steps done.
        """
        self._logged, self._logged_at = step, time.perf_counter()

    def read(self, rates: Mapping[str, float], samples: int) -> list[ReadStep]:
        """Read the steps since the last call. A GPU is waited for.

        Args:
            rates: the last step's learning rates, by group.
            samples: the run's position in the sample stream.
        """
        unread, self._unread = self._unread, []
        read = _on_host(unread)
        self._done = read[-1].applied
        phases = self._timer.read()
        self._seconds += phases
        for name, seconds in (item for phase in phases for item in phase.items()):
            self._metrics.observe_phase(name, seconds)
        stats = self._head.stats if self._done else None
        self._last = {"loss": read[-1].loss if self._done else None, **_of_head(stats)}
        norms = read[-1].outcome.gradient_norms
        self._metrics.record_figures(
            {
                **self._last,
                "loss_scale": self._scale.scale,
                "epoch": samples / self._pass,
                "data_queue_batches": self._stream.ready,
                "data_queue_capacity": self._stream.room,
            },
            skipped=sum(not step.applied for step in read),
            learning_rates=rates,
            gradient_norms={
                group: float(norm) for group, norm in zip(GROUPS, norms, strict=True) if norm is not None and self._done
            },
            centre_norms=None if stats is None or stats.centre_norms is None else stats.centre_norms.tolist(),
        )
        self._metrics.record_decode_errors(self._stream.decode_errors)
        self._metrics.record_sent(self._training_step.sent)
        return read

    def log(self, step: int, samples: int, rates: Mapping[str, float], *, last: bool = False) -> None:
        """Tell of the steps since the last log, which are read. Collective.

        Args:
            step: steps done.
            samples: position in the sample stream.
            rates: as for :meth:`read`.
            last: whether it's the run's last.
        """
        now = time.perf_counter()
        speed = (step - self._logged) * self._batch_size / (now - self._logged_at)
        count = max(len(self._seconds), 1)
        means = {name: sum(of_step.get(name, 0.0) for of_step in self._seconds) / count for name in PHASES}
        self._seconds = []
        figures: dict[str, Any] = {name: self._last.get(name) for name in ("loss", *_OF_THE_HEAD)}
        figures |= self._nearest(last=last)
        self._record_gpu_memory()
        self._journal.record(
            "train",
            step,
            samples=samples,
            samples_per_second=speed,
            learning_rate=dict(rates),
            phase_seconds=means,
            **figures,
        )
        shown = {"loss": figures["loss"], "cos": figures["target_cosine"], "sv": figures["support_vectors_per_sample"]}
        self._journal.show(step, {**shown, "lr": rates["backbone"], "img/s": speed})
        self.restart_clock(step)

    def _nearest(self, *, last: bool) -> dict[str, float | None]:
        """Look up the nearest classes, where that takes no more than a hundredth of the time since it was last done."""
        # A step without an update may have embeddings that aren't finite; whether it had is the same on all ranks.
        if not self._done or not from_first(lambda: last or time.perf_counter() >= self._looks_at):
            return {}
        begin = time.perf_counter()
        nearest = self._training_step.nearest(NEAREST)
        now = time.perf_counter()
        self._looks_at = now + _SELDOM * (now - begin)
        if nearest is None:
            return {}
        self._metrics.record_nearest(nearest.cosines, nearest.accuracy)
        cosines = {f"nearest_cosine_{n}": None if math.isnan(at) else at for n, at in nearest.cosines.items()}
        return {**cosines, "nearest_accuracy": nearest.accuracy}

    def _record_gpu_memory(self) -> None:
        device = self._head.weight.device
        if device.type == "cuda":
            self._metrics.record_gpu_memory(
                allocated=torch.cuda.memory_allocated(device),
                reserved=torch.cuda.memory_reserved(device),
                peak=torch.cuda.max_memory_allocated(device),
            )


def _on_host(steps: Sequence[tuple[int, Outcome]]) -> list[ReadStep]:
    """All of them, in two transfers."""
    losses = [outcome.loss for _, outcome in steps if outcome.loss is not None]
    flags = [outcome.applied for _, outcome in steps if outcome.applied is not None]
    values = iter(torch.stack(losses).tolist() if losses else [])
    done = iter(torch.stack(flags).tolist() if flags else [])
    return [
        ReadStep(
            step,
            outcome,
            None if outcome.loss is None else next(values),
            outcome.applied is not None and next(done),
        )
        for step, outcome in steps
    ]


def _of_head(stats: HeadStats | None) -> dict[str, float | None]:
    """The head's numbers by the names of the metrics; None where the step was skipped."""
    if stats is None:
        return dict.fromkeys(_OF_THE_HEAD)
    return {
        "target_cosine": float(stats.target_cosine),
        "support_vectors_per_sample": None if stats.support_vectors is None else float(stats.support_vectors),
        "support_vector_share": None if stats.support_vector_share is None else float(stats.support_vector_share),
        "sampled_classes": stats.sampled_classes,
        "positive_classes": float(stats.positive_classes),
    }
