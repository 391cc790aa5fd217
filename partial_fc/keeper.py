"""When a run commits its state, and how it goes on from a commit: at its start, and back to one after a divergence."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from partial_fc.build import Place
from partial_fc.checkpoint import Commit, Saver, TrainingState, discard_after, list_commits, step_of
from partial_fc.config import Config
from partial_fc.council import Council
from partial_fc.divergence import DivergenceWatch
from partial_fc.errors import NonFiniteError
from partial_fc.head import PartialFC
from partial_fc.journal import Journal, read_journal
from partial_fc.loss_scale import LossScale
from partial_fc.metrics import TrainingMetrics
from partial_fc.ranks import agreed_while, from_first
from partial_fc.run_folder import Start, first_usable

# How often, and how many seconds apart, the last commit of a run is tried. An elastic agent kills 30 s after a signal.
LAST_ATTEMPTS, LAST_SECONDS = 3, 3.0
# What a rank may ask of all of them: see Council.
SAVE, STOP, DIVERGED = "save", "stop", "diverged"


@dataclass
class Progress:
    """Where a run stands; the same on every rank.

    Attributes:
        step: optimizer steps done.
        samples: position in the sample stream.
        rate_factor: what rollbacks left of the learning rates.
        rollbacks: how many there were.
        accuracy: mean verification accuracy of the state as it is now; None: it wasn't evaluated.
        best: the best of those so far.
    """

    step: int = 0
    samples: int = 0
    rate_factor: float = 1.0
    rollbacks: int = 0
    accuracy: float | None = None
    best: float | None = None


@dataclass
class Kept:
    """What a commit holds beside tensors, and who keeps it.

    Attributes:
        progress: where the run stands.
        scale: the loss scale.
        watch: what looks for divergence.
    """

    scale: LossScale
    watch: DivergenceWatch
    progress: Progress = field(default_factory=Progress)


class Keeper:
    """Commits a run's state, and brings it back. Its methods are called by all ranks at the same step.

    Args:
        config: the configuration.
        place: this process.
        start: the run's folder, and the commit that it goes on from.
        state: backbone, head and optimizers.
        kept: what is saved beside them.
        head: named in the commit.
        council: how ranks agree.
        journal: for lines.
        metrics: for counters.
        beat: called while a commit is waited for.
    """

    def __init__(
        self,
        config: Config,
        place: Place,
        start: Start,
        state: TrainingState,
        kept: Kept,
        head: PartialFC,
        council: Council,
        journal: Journal,
        metrics: TrainingMetrics,
        beat: Callable[[], None],
    ) -> None:
        self._config, self._place, self._start, self._state = config, place, start, state
        self._kept, self._head, self._council, self._beat = kept, head, council, beat
        self._journal, self._metrics, self._status = journal, metrics, start.status
        section = config.checkpoint
        self._saver = Saver(
            start.commits,
            state,
            keep_last=section.keep_last,
            keep_best=section.keep_best,
            background=section.background,
            # As long as the disk takes; but a rank that hangs or is gone is noticed.
            waiting=lambda join: agreed_while(join, mine=True, beat=beat),
            timeout=timedelta(seconds=config.train.timeout_seconds),
        )
        self._owed, self._num_images = False, 0
        self._due_at = self._next_time()
        self._resolved = config.model_dump(mode="json")
        self._went_back_to: int | None = None
        self._best_under_way: tuple[int, float] | None = None
        self._committed = None if start.commit is None else start.commit.step

    @property
    def due(self) -> bool:
        """Whether a commit is due after the step that was done."""
        every = self._config.checkpoint.every_steps
        return self._owed or (every is not None and self._kept.progress.step % every == 0)

    def resume(self, num_images: int) -> int:
        """Load the commit that the start found, where there is one.

        Args:
            num_images: of the data set, of which a commit holds the number, too.

        Returns:
            How often the run was started again by now.

        Raises:
            CheckpointError: on every rank, where it doesn't fit the configuration.
        """
        self._num_images = num_images
        commit, progress = self._start.commit, self._kept.progress
        if commit is not None:
            for line in self._load(commit):
                self._journal.say(f"              {line}")
            before = commit.info.get("num_images", num_images)
            if before != num_images:
                self._journal.warn(f"the data had {before} images at the commit, and has {num_images}: another order")
            self._metrics.record_resume(commit.step)
        restarts = 0
        if self._start.resumes:
            # What was lowered stays so, even where nothing was committed since.
            lowered, before = from_first(self._history)
            if lowered is not None:
                progress.rate_factor, progress.rollbacks = lowered
            restarts = before + 1
        self._look_at_rates(commit)
        if commit is not None or self._start.resumes:
            self._journal.record(
                "resumed",
                progress.step,
                samples=progress.samples,
                world_size=self._place.world_size,
                learning_rate_factor=progress.rate_factor,
                rollbacks=progress.rollbacks,
            )
        return restarts

    def after_step(self) -> None:
        """Commit where one is due, and say what came of the last."""
        self._report()
        self._owed = self.due
        if self._place.rank == 0 and self._due_at is not None and time.monotonic() >= self._due_at:
            self._council.ask(SAVE)
            self._due_at = self._next_time()
        if self._kept.progress.accuracy is not None:
            # A new best can't wait for the next step: the accuracy is that of this very state. And which one is the
            # best is known to all ranks once all saves are done.
            self._saver.finish()
            self._report()
            self._owed = self._owed or self._is_best()
        if self._owed:
            self._owed = not self._saver.save(self._info(), veto=self._kept.watch.in_trouble)

    def owe(self) -> None:
        """Commit at the end of this step, or as soon as an earlier one is written."""
        self._owed = True

    def commit_at_the_end(self, *, veto: bool = False) -> int | None:
        """Commit now, unless this very step is committed, and wait until it's there; a few times where it fails.

        Args:
            veto: don't, on any rank: this state is no good.

        Returns:
            Steps done at the last commit there is; None: there is none.
        """
        step = self._kept.progress.step
        self._saver.finish()
        self._report()
        for attempt in range(LAST_ATTEMPTS):
            # Rank 0 makes the commits, so it knows; another rank may have lost its word.
            committed = from_first(lambda: self._committed)
            if committed == step:
                break
            time.sleep(LAST_SECONDS if attempt else 0)
            if not self._saver.save(self._info(), wait=True, veto=veto):
                break
            self._report()
        return from_first(lambda: self._committed)

    def _history(self) -> tuple[tuple[float, int] | None, int]:
        """What the last start or rollback left of the learning rates, with the count of rollbacks; restarts."""
        lines = read_journal(self._start.folder / "metrics.jsonl")
        restarts = sum(line["kind"] == "resumed" for line in lines)
        for line in reversed(lines):
            if line["kind"] in ("rollback", "resumed") and "learning_rate_factor" in line:
                return (line["learning_rate_factor"], line["rollbacks"]), restarts
        return None, restarts

    def _look_at_rates(self, commit: Commit | None) -> None:
        """Learning rates that somebody has changed since count as they are written; else say what rollbacks left."""
        progress = self._kept.progress
        if progress.rollbacks == 0:
            return
        before = {} if commit is None else commit.info["config"].get("optim", {})
        now = self._resolved["optim"]
        if any(key in before and before[key] != now[key] for key in ("learning_rate", "head_learning_rate")):
            progress.rate_factor, progress.rollbacks = 1.0, 0
            self._journal.say("              optim has other learning rates: rollbacks count from 0 again")
            return
        self._journal.say(
            f"              learning rates x {progress.rate_factor:g} after {progress.rollbacks} rollbacks "
            f"(train.max_rollbacks={self._config.train.max_rollbacks})"
        )

    def roll_back(self) -> None:
        """Go back to the last commit, with lower learning rates; the stream's position is left to the caller.

        Raises:
            NonFiniteError: on every rank, where there is none, or it has been tried too often.
        """
        section, progress = self._config.train, self._kept.progress
        done, factor, rollbacks = progress.step, progress.rate_factor, progress.rollbacks + 1
        if rollbacks > section.max_rollbacks:
            raise NonFiniteError(
                f"the run diverged at step {done} again, after {section.max_rollbacks} returns to a commit "
                "(train.max_rollbacks): lower optim.learning_rate, or look at the data"
            )
        self._saver.finish()
        self._report()
        commit = first_usable(from_first(self._candidates), self._place)
        if commit is None:
            raise NonFiniteError(
                f"the run diverged at step {done}, and there is no commit to go back to: lower optim.learning_rate"
            )
        self._load(commit)
        from_first(lambda: discard_after(self._start.commits, commit.step))
        self._went_back_to = self._committed = commit.step
        progress.rate_factor, progress.rollbacks = factor * section.rollback_factor, rollbacks
        self._kept.watch.reset()
        self._owed = False
        self._metrics.record_rollback()
        self._journal.record(
            "rollback", commit.step, diverged_at=done, learning_rate_factor=progress.rate_factor, rollbacks=rollbacks
        )
        self._journal.say(
            f"back to step {commit.step} from step {done}, learning rates x {progress.rate_factor:g} from here on"
        )

    def close(self) -> None:
        """Wait for a save under way."""
        self._saver.finish()
        self._report()
        self._saver.close()

    def _candidates(self) -> list[Path]:
        """Commits to go back to, on rank 0."""
        folders, start = list_commits(self._start.commits), self._start.commit
        if start is not None and start.folder not in folders:
            folders.append(start.folder)
        # Where nothing was committed since the last return, that state leads to the same place: older ones come first.
        suspect = [folder for folder in folders if step_of(folder) == self._went_back_to]
        return [folder for folder in folders if folder not in suspect] + suspect

    def _is_best(self) -> bool:
        """Whether the state has the best accuracy so far, of those that were committed."""
        accuracy, best = self._kept.progress.accuracy, self._kept.progress.best
        return self._config.checkpoint.keep_best and accuracy is not None and (best is None or accuracy > best)

    def _next_time(self) -> float | None:
        minutes = self._config.checkpoint.every_minutes
        return None if minutes is None else time.monotonic() + 60 * minutes

    def _info(self) -> dict[str, Any]:
        kept, head = self._kept, self._head
        best = self._is_best()
        if best and kept.progress.accuracy is not None:
            self._best_under_way = kept.progress.step, kept.progress.accuracy
        return {
            "step": kept.progress.step,
            "samples": kept.progress.samples,
            "num_images": self._num_images,
            "num_classes": head.num_classes,
            "embedding_size": head.embedding_size,
            "margin": str(head.margin),
            "negatives": str(head.negatives),
            "world_size": self._place.world_size,
            "loss_scale": kept.scale.state_dict(),
            "watch": kept.watch.state_dict(),
            "learning_rate_factor": kept.progress.rate_factor,
            "rollbacks": kept.progress.rollbacks,
            "accuracy": kept.progress.accuracy,
            "best": kept.progress.accuracy if best else kept.progress.best,
            "config": self._resolved,
            "versions": {
                "partial_fc": metadata.version("partial_fc"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "contents": ["backbone", "head", "backbone_optimizer", "head_optimizer"],
        }

    def _load(self, commit: Commit) -> list[str]:
        # Many gigabytes take one rank longer than another, and all of them longer than a collective may.
        lines = agreed_while(lambda: self._state.load(commit.folder, commit.info), mine=True, beat=self._beat)
        assert lines is not None
        info: Mapping[str, Any] = commit.info
        self._kept.scale.load_state_dict(info.get("loss_scale") or {})
        if info.get("watch"):
            self._kept.watch.load_state_dict(info["watch"])
        progress = self._kept.progress
        progress.step, progress.samples = int(info["step"]), int(info["samples"])
        progress.rate_factor = float(info.get("learning_rate_factor", 1.0))
        progress.rollbacks = int(info.get("rollbacks", 0))
        progress.accuracy, progress.best = info.get("accuracy"), info.get("best")
        return lines

    def _report(self) -> None:
        """Say what came of the saves that are done since the last call."""
        while (saved := self._saver.outcome()) is not None:
            failed = saved.failure is not None
            self._metrics.record_commit(
                saved.step, saved.seconds, copy_seconds=saved.copy_seconds, size=saved.bytes, failed=failed
            )
            if failed:
                self._journal.warn(f"step {saved.step} could not be committed ({saved.failure}): the last commit stays")
                self._due_at = time.monotonic() + self._config.checkpoint.retry_seconds
                continue
            self._committed = saved.step
            if self._best_under_way is not None and self._best_under_way[0] == saved.step:
                self._kept.progress.best = self._best_under_way[1]
            if self._went_back_to is not None and saved.step > self._went_back_to:
                self._went_back_to = None
            self._status.write("running", self._kept.progress.step, committed=saved.step)
            self._journal.record("commit", saved.step, write_seconds=saved.seconds, copy_seconds=saved.copy_seconds)
            if saved.note is not None:
                self._journal.warn(saved.note)
