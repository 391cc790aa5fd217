"""The training loop: steps, and beside them the log, metrics, evaluation, commits, and what may go wrong."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import shutil
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from partial_fc import build
from partial_fc.build import Place
from partial_fc.checkpoint import WRITE_TIMEOUT, TrainingState, save_model
from partial_fc.config import Config
from partial_fc.council import Council
from partial_fc.data import Sources
from partial_fc.divergence import DivergenceWatch
from partial_fc.endpoint import open_endpoint
from partial_fc.errors import CheckpointError, ConfigError, LabelError, MisfitError, NonFiniteError
from partial_fc.evaluate import VerificationResult
from partial_fc.figures import Figures
from partial_fc.journal import Journal
from partial_fc.keeper import DIVERGED, LAST_ATTEMPTS, LAST_SECONDS, SAVE, STOP, Keeper, Kept
from partial_fc.loop import Course, Loop
from partial_fc.metrics import TrainingMetrics
from partial_fc.phases import PhaseTimer
from partial_fc.preemption import Preemption
from partial_fc.progress import progress_bar
from partial_fc.ranks import agreed, agreed_while, from_first
from partial_fc.run_folder import Start, differences, open_run_folder
from partial_fc.targets import clear_targets
from partial_fc.training_step import TrainingStep
from partial_fc.verify import verification_sets
from partial_fc.watchdog import Watchdog

# Errors that a start of the same command meets again.
_LASTING = (ConfigError, LabelError, NonFiniteError, MisfitError)


class Trainer:
    """One run on this rank, from its beginning or from its last commit.

    Args:
        config: the configuration.
        place: this process.
    """

    def __init__(self, config: Config, place: Place) -> None:
        self.config, self.place = config, place
        if config.train.precision == "tf32" and place.device.type == "cuda":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
        self.precision = agreed(lambda: build.choose_precision(config, place.device))
        sources = open_sources(config, place)
        num_classes = sources.num_classes
        order = agreed(lambda: build.build_order(config, sources))
        agreed(lambda: build.total_steps(config, order.length))
        self.sets = agreed(lambda: verification_sets(config))
        self.stream = agreed(lambda: build.build_stream(config, sources, order, place))
        self.backbone = agreed(lambda: build.build_backbone(config, place))
        self.head = agreed(lambda: build.build_head(config, num_classes, place, self.precision))
        self.optimizers = build.build_optimizers(config, self.backbone, self.head)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.start = open_run_folder(config, place)
        self.folder = self.start.folder
        self.steps = _steps(config, order.length, self.start)
        self.schedule = build.build_schedule(config, self.steps)
        # Where all ranks stand in collectives, the process group's timeout comes first.
        stall = config.train.stall_seconds or config.train.timeout_seconds / 2
        limit = max(2 * config.train.timeout_seconds, stall)
        self.watchdog = Watchdog(
            place.store,
            place.rank,
            place.world_size,
            stall_seconds=stall,
            limit_seconds=limit,
            folder=self.folder,
        )
        self.timer = PhaseTimer(place.device, entered=lambda name: self.watchdog.beat(name, self.kept.progress.step))
        self.training_step = TrainingStep(
            config, place, self.stream, self.backbone, self.head, self.optimizers, self.precision, self.timer
        )
        watch = DivergenceWatch(
            config.train.divergence_factor,
            window=config.train.divergence_window,
            nonfinite_limit=config.train.nonfinite_limit,
        )
        self.kept = Kept(self.training_step.scale, watch)
        self.council = Council((SAVE, STOP, DIVERGED), timeout=timedelta(seconds=config.train.timeout_seconds))
        self.num_samples, self.num_classes, self._order_length = len(sources), num_classes, order.length

    def fit(self) -> dict[str, VerificationResult] | None:
        """Train to the last step, evaluate, save the model.

        Returns:
            The last evaluation by set; None where a signal ended the run, which is saved then.
        """
        config, place = self.config, self.place
        metrics = TrainingMetrics(place.rank, place.world_size, place.local_rank, info=self._info())
        first = 0 if self.start.commit is None else self.start.commit.step
        journal = agreed(lambda: Journal(self.folder, self.steps, active=place.rank == 0, first_step=first))
        state = TrainingState(self.backbone, self.head, *self.optimizers)
        metrics.watch_stalls(lambda: self.watchdog.stalled)
        preemption = Preemption(local_rank=place.local_rank, rank=place.rank)
        with contextlib.ExitStack() as opened:
            for resource in (journal, metrics, self.stream, preemption, self.watchdog):
                opened.enter_context(resource)
            if self.start.lock is not None:
                opened.enter_context(self.start.lock)
            if self.start.finished:
                if place.rank == 0:
                    clear_targets(self.folder)
                journal.say(f"{self.folder}: the run is finished already, its job was only started again")
                return None
            if config.metrics.enabled:
                open_endpoint(config, place, metrics, self.folder)
            elif place.rank == 0:
                # What an earlier start left.
                clear_targets(self.folder)
            self._announce(journal, metrics)
            beat = functools.partial(self.watchdog.beat, "commit")
            keeper = Keeper(
                config, place, self.start, state, self.kept, self.head, self.council, journal, metrics, beat
            )
            try:
                return self._train(journal, metrics, keeper, preemption)
            except _LASTING as error:
                # A good commit may be under way.
                keeper.close()
                self.start.status.write("failed", self.kept.progress.step, reason=str(error))
                raise

    def _train(
        self, journal: Journal, metrics: TrainingMetrics, keeper: Keeper, preemption: Preemption
    ) -> dict[str, VerificationResult] | None:
        progress, status = self.kept.progress, self.start.status
        restarts = keeper.resume(num_images=self.num_samples)
        metrics.record_start(planned_steps=self.steps, restarts=restarts)
        self.stream.seek(progress.samples)
        status.write("running", progress.step, steps=self.steps, world_size=self.place.world_size)
        loop = Loop(self._course(), self._figures(journal, metrics), journal, metrics, keeper, preemption)
        if not loop.run():
            self._end_on_signal(journal, keeper, preemption)
            return None
        results = loop.evaluate()
        keeper.commit_at_the_end()
        keeper.close()
        self._save_model(journal)
        self._end("finished")
        return results

    def _course(self) -> Course:
        return Course(
            config=self.config,
            place=self.place,
            start=self.start,
            steps=self.steps,
            stream=self.stream,
            backbone=self.backbone,
            training_step=self.training_step,
            set_learning_rates=self.set_learning_rates,
            sets=self.sets,
            council=self.council,
            watchdog=self.watchdog,
            kept=self.kept,
        )

    def _figures(self, journal: Journal, metrics: TrainingMetrics) -> Figures:
        return Figures(
            self.training_step,
            self.head,
            self.stream,
            self.kept.scale,
            self.timer,
            journal,
            metrics,
            batch_size=self.config.train.batch_size,
            samples_a_pass=self._order_length,
        )

    def _info(self) -> dict[str, str]:
        return {
            "version": importlib.metadata.version("partial_fc"),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.place.device.type == "cuda" else "cpu",
        }

    def _end(self, state: str) -> None:
        """The run's processes end in order: nobody shall look for their endpoints any more."""
        if self.place.rank == 0:
            clear_targets(self.folder)
        self.start.status.write(state, self.kept.progress.step)

    def _end_on_signal(self, journal: Journal, keeper: Keeper, preemption: Preemption) -> None:
        signal, step = preemption.requested or "a signal to another rank", self.kept.progress.step
        committed = keeper.commit_at_the_end(veto=self.kept.watch.in_trouble)
        keeper.close()
        self._end("resume")
        where = "nothing is committed" if committed is None else f"the last commit is of step {committed}"
        journal.say(f"{signal} ended the run after step {step}, {where}: start the same command again to go on")

    def _save_model(self, journal: Journal) -> None:
        folder = self.folder / "model"
        # What a run of another world size left there, when it was killed at its very end.
        from_first(lambda: shutil.rmtree(folder, ignore_errors=True))
        # Written in a thread with a group of its own: one rank's disk may take longer than a collective may.
        group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT) if dist.is_initialized() else None
        beat = functools.partial(self.watchdog.beat, "model")
        for attempt in range(LAST_ATTEMPTS):
            try:
                agreed_while(lambda: save_model(folder, self.backbone, self.head, group), mine=True, beat=beat)
                break
            except CheckpointError as error:
                # Raised on every rank. A disk may be full for a while only.
                if attempt + 1 == LAST_ATTEMPTS:
                    raise
                journal.warn(f"{error}: it's tried again in {LAST_SECONDS:g} s")
                time.sleep(LAST_SECONDS)
        journal.say(f"saved the model in {folder}")

    def set_learning_rates(self) -> dict[str, float]:
        """Set the rates of the step to come; those of backbone and head."""
        factor = self.schedule(self.kept.progress.step) * self.kept.progress.rate_factor
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        backbone, head = (optimizer.param_groups[0]["lr"] for optimizer in self.optimizers)
        return {"backbone": backbone, "head": head}

    def _announce(self, journal: Journal, metrics: TrainingMetrics) -> None:
        config, place = self.config, self.place
        parameters = sum(parameter.numel() for parameter in self.backbone.parameters()) / 1e6
        in_backward, why = build.updates_in_backward(config)
        journal.say(f"run folder    {self.folder}")
        journal.say(f"metrics       {metrics.url or 'not served'}")
        paths = ", ".join(source.path for source in (config.data, *config.data.more))
        journal.say(f"data          {self.num_samples} images of {self.num_classes} classes, {paths}")
        journal.say(f"order         {config.data.order}, {self._order_length} positions a pass")
        journal.say(f"decoder       {self.stream.decoder}")
        journal.say(
            f"backbone      {config.backbone.name}, {parameters:.2f} M parameters, {config.backbone.embedding_size}-d"
        )
        journal.say(f"head          {self.head.extra_repr()}")
        journal.say(f"class centres updated {'in backward' if in_backward else 'in two phases'}: {why}")
        journal.say(
            f"training      {self.steps} steps of {config.train.batch_size} "
            f"on {place.world_size} x {place.device.type}, {str(self.precision).removeprefix('torch.')}"
        )
        commit = self.start.commit
        if commit is not None:
            left = "" if commit.step < self.steps else f": none of the {self.steps} steps is left"
            journal.say(f"goes on       from step {commit.step}, {commit.folder}{left}")
            for line in differences(commit.info["config"], config.model_dump(mode="json")):
                journal.say(f"              {line}")


def open_sources(config: Config, place: Place) -> Sources:
    """The training images, on every rank; a rank of each machine makes their table where it isn't there. Collective.

    Raises:
        DataError, ConfigError: on every rank, where they can't be read on one.
    """
    with progress_bar("finding the images", active=place.rank == 0) as progress:
        first = agreed_while(lambda: build.build_sources(config, progress), mine=place.local_rank == 0)
        # From the table that was made there; where it couldn't be kept, each makes its own, which takes as long again.
        other = agreed_while(lambda: build.build_sources(config, progress), mine=place.local_rank != 0)
    sources = first or other
    assert sources is not None
    return sources


def _steps(config: Config, samples_a_pass: int, start: Start) -> int:
    """Steps of the whole run; where it goes on with another batch size, passes count by samples."""
    total = build.total_steps(config, samples_a_pass)
    if start.commit is None or config.train.epochs is None:
        return total
    step, samples, batch_size = start.commit.step, start.commit.info["samples"], config.train.batch_size
    if samples == step * batch_size:
        return total
    return step + max(0, round((config.train.epochs * samples_a_pass - samples) / batch_size))
