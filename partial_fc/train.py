"""The training loop: steps, and beside them the log, metrics, evaluation, commits, and what may go wrong."""

from __future__ import annotations

import contextlib
import functools
import shutil
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from partial_fc import build
from partial_fc.build import Place
from partial_fc.checkpoint import WRITE_TIMEOUT, TrainingState, save_model
from partial_fc.config import Config
from partial_fc.council import Council
from partial_fc.data import Sources
from partial_fc.divergence import DivergenceWatch
from partial_fc.errors import CheckpointError, ConfigError, LabelError, MisfitError, NonFiniteError
from partial_fc.evaluate import VerificationResult
from partial_fc.head import HeadStats
from partial_fc.journal import Journal
from partial_fc.keeper import DIVERGED, LAST_ATTEMPTS, LAST_SECONDS, SAVE, STOP, Keeper, Kept
from partial_fc.metrics import PHASES, TrainingMetrics
from partial_fc.phases import PhaseTimer
from partial_fc.preemption import Preemption
from partial_fc.progress import progress_bar
from partial_fc.ranks import agreed, agreed_while, from_first
from partial_fc.run_folder import Start, differences, open_run_folder
from partial_fc.training_step import Outcome, TrainingStep
from partial_fc.verify import describe, evaluate_sets, verification_sets
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
        metrics = TrainingMetrics(place.rank, place.world_size, place.local_rank)
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
                journal.say(f"{self.folder}: the run is finished already, its job was only started again")
                return None
            if config.metrics.enabled:
                agreed(lambda: metrics.start(config.metrics.port, config.metrics.address))
            self._announce(journal, metrics)
            beat = functools.partial(self.watchdog.beat, "commit")
            keeper = Keeper(
                config, place, self.start, state, self.kept, self.head, self.council, journal, metrics, beat
            )
            try:
                return self._train(_Loop(self, journal, metrics, keeper, preemption), journal, keeper, preemption)
            except _LASTING as error:
                # A good commit may be under way.
                keeper.close()
                self.start.status.write("failed", self.kept.progress.step, reason=str(error))
                raise

    def _train(
        self, loop: _Loop, journal: Journal, keeper: Keeper, preemption: Preemption
    ) -> dict[str, VerificationResult] | None:
        progress, status = self.kept.progress, self.start.status
        keeper.resume(num_images=self.num_samples)
        self.stream.seek(progress.samples)
        status.write("running", progress.step, steps=self.steps, world_size=self.place.world_size)
        if not loop.run():
            self._end_on_signal(journal, keeper, preemption)
            return None
        results = loop.evaluate()
        keeper.commit_at_the_end()
        keeper.close()
        self._save_model(journal)
        status.write("finished", progress.step)
        return results

    def _end_on_signal(self, journal: Journal, keeper: Keeper, preemption: Preemption) -> None:
        signal, step = preemption.requested or "a signal to another rank", self.kept.progress.step
        committed = keeper.commit_at_the_end(veto=self.kept.watch.in_trouble)
        keeper.close()
        self.start.status.write("resume", step)
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


class _Loop:
    """The steps of a run, with what comes between them."""

    def __init__(
        self, trainer: Trainer, journal: Journal, metrics: TrainingMetrics, keeper: Keeper, preemption: Preemption
    ) -> None:
        self._trainer, self._journal, self._metrics = trainer, journal, metrics
        self._keeper, self._preemption = keeper, preemption
        self._config, self._progress = trainer.config, trainer.kept.progress
        # Steps whose outcome nobody has read from the device yet.
        self._unread: list[tuple[int, Outcome]] = []
        self._figures: dict[str, Any] = {}
        self._seconds: list[dict[str, float]] = []
        self._logged, self._logged_at = 0, 0.0
        self._diverged: str | None = None

    def run(self) -> bool:
        """Train to the last step, or until a signal; whether it was the last step."""
        trainer, progress, every = self._trainer, self._progress, self._config.evaluate.every_steps
        council = trainer.council
        self._logged, self._logged_at = progress.step, time.perf_counter()
        while True:
            if progress.step >= trainer.steps:
                asked = council.drain()
                if DIVERGED not in asked:
                    # After a signal in the last step the next start does what is left.
                    return STOP not in asked
                self._go_back()
                continue
            rates = trainer.set_learning_rates()
            outcome = trainer.training_step.run(progress.step)
            self._unread.append((progress.step, outcome))
            progress.step += 1
            progress.samples, progress.accuracy = trainer.stream.position, None
            self._journal.advance(progress.step)
            last = progress.step == trainer.steps
            logs = progress.step % self._config.train.log_every == 0 or last
            evaluates = every is not None and progress.step % every == 0 and not last
            # Reading is where a GPU synchronises, so it happens at such steps only.
            if trainer.place.device.type == "cpu" or logs or evaluates or self._keeper.due:
                self._read(rates)
            if logs:
                self._log(rates)
            if evaluates:
                self.evaluate()
            if self._preemption.requested is not None:
                council.ask(STOP)
            asked = council.exchange()
            if DIVERGED in asked:
                self._go_back()
                continue
            if asked and self._unread:
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
        trainer, step = self._trainer, self._progress.step
        beat = trainer.watchdog.beat
        beat("evaluation", step)
        results = evaluate_sets(
            self._config, trainer.backbone, trainer.sets, trainer.place, trainer.precision, lambda: beat("evaluation")
        )
        for name, result in results.items():
            self._metrics.record_verification(name, result.accuracy)
            self._journal.record("evaluation", step, set=name, **result.summary())
            self._journal.say(f"step {step}/{trainer.steps}  {describe(name, result)}")
        if results:
            self._progress.accuracy = statistics.fmean(result.accuracy for result in results.values())
        self._logged_at = time.perf_counter()
        return results

    def _read(self, rates: dict[str, float]) -> None:
        """Read what the steps since the last call came to, count it, and look whether the run goes astray."""
        unread, self._unread = self._unread, []
        trainer = self._trainer
        losses, applied = _on_host(unread)
        skipped = 0
        for (step, outcome), loss, done in zip(unread, losses, applied, strict=True):
            overflowed = outcome.overflowed and trainer.kept.scale.scale > 1
            skipped += not done
            if not done and not outcome.overflowed:
                self._tell_skipped(step, outcome)
            # An overflow in fp16 is met by a lower scale, and is no sign of a divergence until that can't fall.
            reason = trainer.kept.watch.see(loss if done or overflowed else None)
            if reason is not None:
                self._diverged = self._diverged or f"step {step + 1}: {reason}"
                trainer.council.ask(DIVERGED)
        done = bool(applied[-1])
        self._figures = _figures(losses[-1] if done else None, trainer.head.stats)
        phases = trainer.timer.read()
        self._seconds += phases
        for name, value in (item for phase in phases for item in phase.items()):
            self._metrics.observe_phase(name, value)
        self._metrics.record_step(
            trainer.training_step.local_samples * len(unread),
            steps=len(unread),
            skipped=skipped,
            learning_rates=rates,
            **self._figures,
        )
        self._metrics.record_decode_errors(trainer.stream.decode_errors)

    def _tell_skipped(self, step: int, outcome: Outcome) -> None:
        """Name the samples of a step without an update, those of all ranks; all are here."""
        reason = outcome.reason or "the gradient of the backbone isn't finite"
        if self._config.train.nonfinite == "stop":
            raise NonFiniteError(f"step {step + 1}: {reason}")
        ids = [outcome.sample_ids.tolist()] * self._trainer.place.world_size
        if dist.is_initialized():
            dist.all_gather_object(ids, ids[0])
        samples = [sample for of_rank in ids for sample in of_rank]
        self._journal.record("skipped", step + 1, reason=reason, sample_ids=samples)
        self._journal.warn(
            f"step {step + 1} is skipped: {reason} (metrics.jsonl names the {len(samples)} samples: {_few(samples)})"
        )

    def _go_back(self) -> None:
        """After a divergence: to the last commit, or an end."""
        reason = self._diverged or f"step {self._progress.step}: another rank's loss"
        if self._config.train.on_divergence == "stop":
            raise NonFiniteError(
                f"the run diverged ({reason}): lower optim.learning_rate, or set train.on_divergence=rollback; its "
                f"last commit is in {self._trainer.start.commits}"
            )
        self._journal.warn(f"the run diverged ({reason})")
        self._keeper.roll_back()
        self._trainer.stream.seek(self._progress.samples)
        self._unread, self._diverged = [], None
        self._logged, self._logged_at = self._progress.step, time.perf_counter()

    def _log(self, rates: dict[str, float]) -> None:
        step, batch_size = self._progress.step, self._config.train.batch_size
        now = time.perf_counter()
        speed = (step - self._logged) * batch_size / (now - self._logged_at)
        self._logged, self._logged_at = step, now
        count = max(len(self._seconds), 1)
        means = {name: sum(of_step.get(name, 0.0) for of_step in self._seconds) / count for name in PHASES}
        self._seconds = []
        figures = self._figures
        self._journal.record(
            "train",
            step,
            samples=self._progress.samples,
            samples_per_second=speed,
            learning_rate=rates,
            phase_seconds=means,
            **figures,
        )
        shown = {"loss": figures["loss"], "cos": figures["target_cosine"], "sv": figures["support_vectors_per_sample"]}
        self._trainer.start.status.write("running", step)
        self._journal.show(step, {**shown, "lr": rates["backbone"], "img/s": speed})


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


def _on_host(steps: Sequence[tuple[int, Outcome]]) -> tuple[list[float | None], list[bool]]:
    """(loss or None, whether the step was applied) of each, in two transfers."""
    losses = [outcome.loss for _, outcome in steps if outcome.loss is not None]
    flags = [outcome.applied for _, outcome in steps if outcome.applied is not None]
    values = iter(torch.stack(losses).tolist() if losses else [])
    done = iter(torch.stack(flags).tolist() if flags else [])
    return (
        [None if outcome.loss is None else next(values) for _, outcome in steps],
        [outcome.applied is not None and next(done) for _, outcome in steps],
    )


def _few(samples: Sequence[int], count: int = 8) -> str:
    text = ", ".join(map(str, samples[:count]))
    return f"{text}, ..." if len(samples) > count else text


def _figures(loss: float | None, stats: HeadStats | None) -> dict[str, Any]:
    """The step's numbers; None where it was skipped."""
    if loss is None or stats is None:
        names = ("loss", "target_cosine", "support_vectors_per_sample", "sampled_classes")
        return dict.fromkeys(names)
    return {
        "loss": loss,
        "target_cosine": float(stats.target_cosine),
        "support_vectors_per_sample": None if stats.support_vectors is None else float(stats.support_vectors),
        "sampled_classes": stats.sampled_classes,
    }
