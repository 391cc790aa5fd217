"""The training loop: data, backbone, head, optimizers; metrics and evaluation beside it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from partial_fc import build
from partial_fc.build import Place
from partial_fc.checkpoint import load_backbone, save_model
from partial_fc.config import Config
from partial_fc.data import Batch, Sources, decode_images
from partial_fc.errors import ConfigError, DataError, LabelError, NonFiniteError
from partial_fc.evaluate import VerificationResult, evaluate_pairs
from partial_fc.head import HeadStats
from partial_fc.journal import Journal
from partial_fc.loss_scale import LossScale
from partial_fc.metrics import PHASES, TrainingMetrics
from partial_fc.optim import clip_shards
from partial_fc.permutation import hash64
from partial_fc.progress import progress_bar
from partial_fc.ranks import agreed, agreed_while


def make_run_folder(config: Config, place: Place) -> Path:
    """A new folder ``run_dir/name`` (``name-2``, ... where runs of that name are there) with ``config.yaml`` in it."""
    name = config.train.name
    assert name is not None
    chosen: list[Path | None] = [None]

    def make() -> None:
        if place.rank:
            return
        number = 1
        while chosen[0] is None:
            folder = Path(config.train.run_dir) / (f"{name}-{number}" if number > 1 else name)
            number += 1
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                chosen[0] = folder
                config.dump(folder / "config.yaml")

    agreed(make)
    if dist.is_initialized():
        dist.broadcast_object_list(chosen)
    assert chosen[0] is not None
    return chosen[0]


class PhaseTimer:
    """Seconds by phase of a step: by the clock on a CPU, by events on a GPU (which are read at the next log)."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[list[tuple[str, Any, Any]]] = []
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block for a phase."""
        begin = time.perf_counter()
        if self._cuda and name != "data":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
        else:
            yield
            self._seconds[name] += time.perf_counter() - begin

    def end_step(self) -> None:
        """Close the step: what follows belongs to the next one."""
        self._open.append([*self._events, *((name, None, value) for name, value in self._seconds.items())])
        self._events, self._seconds = [], defaultdict(float)

    def read(self) -> list[dict[str, float]]:
        """Seconds by phase of each step since the last call. On a GPU, call it after something that synchronises."""
        steps, self._open = self._open, []
        read = []
        for events in steps:
            seconds: defaultdict[str, float] = defaultdict(float)
            for name, first, last in events:
                if first is not None:
                    last.synchronize()
                seconds[name] += last if first is None else first.elapsed_time(last) / 1000
            read.append(dict(seconds))
        return read


class Trainer:
    """One run on this rank.

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
        self.steps = agreed(lambda: build.total_steps(config, order.length))
        self.sets = agreed(lambda: verification_sets(config))
        self.stream = agreed(lambda: build.build_stream(config, sources, order, place))
        self.backbone = agreed(lambda: build.build_backbone(config, place))
        self.head = agreed(lambda: build.build_head(config, num_classes, place, self.precision))
        self.optimizers = build.build_optimizers(config, self.backbone, self.head)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.schedule = build.build_schedule(config, self.steps)
        self.scale = LossScale(self.head.group.sum_over_shards, enabled=self.precision == torch.float16)
        self._replica: nn.Module = self.backbone
        if place.world_size > 1:
            devices = [place.device] if place.device.type == "cuda" else None
            # BatchNorm statistics are each rank's own; rank 0's are evaluated and saved. torch 2.13 renames the option.
            known = inspect.signature(DistributedDataParallel).parameters
            own_buffers: dict[str, Any] = {
                "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
            }
            self._replica = DistributedDataParallel(
                self.backbone, device_ids=devices, gradient_as_bucket_view=True, **own_buffers
            )
        self.folder = make_run_folder(config, place)
        self.timer = PhaseTimer(place.device)
        self.num_samples, self.num_classes, self._order_length = len(sources), num_classes, order.length
        self.skipped = 0
        self._data_failure: DataError | None = None

    def fit(self) -> dict[str, VerificationResult]:
        """Train to the last step, evaluate, save the model, and return the last evaluation by set."""
        config, place = self.config, self.place
        metrics = TrainingMetrics(place.rank, place.world_size, place.local_rank)
        journal = Journal(self.folder, self.steps, active=place.rank == 0)
        with journal, metrics, self.stream:
            if config.metrics.enabled:
                agreed(lambda: metrics.start(config.metrics.port, config.metrics.address))
            self._announce(journal, metrics)
            self._loop(journal, metrics)
            results = self._evaluate(self.steps, journal, metrics)
            save_model(self.folder / "model", self.backbone, self.head)
            journal.say(f"saved the model in {self.folder / 'model'}")
        return results

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

    def _loop(self, journal: Journal, metrics: TrainingMetrics) -> None:
        config = self.config
        every = config.evaluate.every_steps
        on_cpu = self.place.device.type == "cpu"
        counted = 0
        logged, logged_at = 0, time.perf_counter()
        seconds: list[dict[str, float]] = []
        for step in range(self.steps):
            rates = self._set_learning_rates(step)
            loss = self._step(step)
            due = (step + 1) % config.train.log_every == 0 or step + 1 == self.steps
            evaluates = every is not None and (step + 1) % every == 0 and step + 1 < self.steps
            journal.advance(step + 1)
            if not (on_cpu or due or evaluates):
                continue
            # Reading the loss is where a GPU synchronises, so it happens at the log's steps only.
            figures = _figures(loss, self.head.stats)
            phases = self.timer.read()
            seconds += phases
            for name, value in (item for phase in phases for item in phase.items()):
                metrics.observe_phase(name, value)
            metrics.record_step(
                self._local_samples * (step + 1 - counted),
                steps=step + 1 - counted,
                skipped=self._newly_skipped(),
                learning_rates=rates,
                **figures,
            )
            counted = step + 1
            metrics.record_decode_errors(self.stream.decode_errors)
            if due:
                now = time.perf_counter()
                speed = (step + 1 - logged) * config.train.batch_size / (now - logged_at)
                logged, logged_at = step + 1, now
                self._log(journal, step + 1, figures, rates, speed, seconds)
                seconds = []
            if evaluates:
                self._evaluate(step + 1, journal, metrics)
                logged_at = time.perf_counter()

    @property
    def _local_samples(self) -> int:
        rows, micro = self.config.train.batch_size, self.config.train.accumulate
        rank, world_size = self.place.rank, self.place.world_size
        per_micro = rows // micro
        return micro * ((rank + 1) * per_micro // world_size - rank * per_micro // world_size)

    def _newly_skipped(self) -> int:
        skipped, self.skipped = self.skipped, 0
        return skipped

    def _set_learning_rates(self, step: int) -> dict[str, float]:
        factor = self.schedule(step)
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        backbone, head = (optimizer.param_groups[0]["lr"] for optimizer in self.optimizers)
        return {"backbone": backbone, "head": head}

    def _step(self, step: int) -> torch.Tensor | None:
        """One optimizer step; the mean loss (on the device), or None where the step was skipped."""
        accumulate = self.config.train.accumulate
        losses = []
        try:
            for micro in range(accumulate):
                losses.append(self._micro_step(step, last=micro + 1 == accumulate))
            self.head.check()
            updated = self._update()
        except LabelError:
            # Raised on every rank, so all are here; where a rank's data failed, that was the reason.
            agreed(self._raise_data_failure)
            raise
        except NonFiniteError as error:
            if self.config.train.nonfinite == "stop":
                raise
            logging.getLogger(__name__).warning("step %d is skipped: %s", step, error)
            updated = False
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        following = (step + 1) * self.config.train.batch_size
        if self.stream.position != following:
            self.stream.seek(following)
        self.timer.end_step()
        if not updated:
            self.skipped += 1
        return torch.stack(losses).mean() if updated else None

    def _micro_step(self, step: int, *, last: bool) -> torch.Tensor:
        """Forward and backward of a micro batch; its loss, detached."""
        phase = self.timer.phase
        self.head.position.fill_(self.stream.position)
        self.head.step.fill_(step)
        if self.config.backbone.dropout > 0:
            torch.manual_seed(hash64(self.config.train.seed, self.stream.position, self.place.rank) >> 1)
        with phase("data"):
            batch = self._next_batch()
            images = batch.images.to(memory_format=torch.channels_last)
        with phase("head"):
            self.head.prepare(batch.labels)
        silent = isinstance(self._replica, DistributedDataParallel) and not last
        with self._replica.no_sync() if silent else contextlib.nullcontext():  # type: ignore[operator]
            with phase("backbone"), self._autocast():
                embeddings = self._replica(images)
            with phase("head"):
                # The head's graph is cut off, so that its time is told from the backbone's.
                leaf = embeddings.detach().requires_grad_()
                loss: torch.Tensor = self.head(leaf, batch.labels)
                factor = self.scale.scale / self.config.train.accumulate
                (loss * factor if factor != 1 else loss).backward()
            with phase("backbone"):
                embeddings.backward(leaf.grad)
        return loss.detach()

    def _next_batch(self) -> Batch:
        """The next batch; where the data fails, one without a valid label, at which the head stops every rank."""
        if self._data_failure is None:
            try:
                return self.stream.next_batch()
            except DataError as error:
                self._data_failure = error
            except (OSError, MemoryError) as error:
                reason = f"{type(error).__name__}: {error}"
                self._data_failure = DataError(f"the next batch can't be read ({reason}): look at this machine")
        side, rows = self.config.data.image_size, self._local_samples // self.config.train.accumulate
        images = torch.zeros(rows, 3, side, side, device=self.place.device)
        nothing = torch.full((rows,), -1)
        return Batch(images, nothing, nothing, nothing)

    def _raise_data_failure(self) -> None:
        if self._data_failure is not None:
            raise self._data_failure

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.place.device.type, self.precision)

    def _update(self) -> bool:
        """Clip and apply the gradients; False where fp16 overflowed (on any rank) and nothing was applied."""
        section = self.config.optim
        with self.timer.phase("optimizer"):
            if not self.scale.unscale([*self.backbone.parameters(), self.head.weight]):
                return False
            if section.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.backbone.parameters(), section.clip_norm)
            if section.head_clip_norm is not None:
                clip_shards(self.head.weight, section.head_clip_norm, self.head.group.sum_over_shards)
            for optimizer in self.optimizers:
                optimizer.step()
        return True

    def _log(
        self,
        journal: Journal,
        step: int,
        figures: dict[str, float | None],
        rates: dict[str, float],
        speed: float,
        seconds: list[dict[str, float]],
    ) -> None:
        count = max(len(seconds), 1)
        means = {name: sum(of_step.get(name, 0.0) for of_step in seconds) / count for name in PHASES}
        journal.record(
            "train",
            step,
            samples=step * self.config.train.batch_size,
            samples_per_second=speed,
            learning_rate=rates,
            phase_seconds=means,
            **figures,
        )
        shown = {"loss": figures["loss"], "cos": figures["target_cosine"], "sv": figures["support_vectors_per_sample"]}
        journal.show(step, {**shown, "lr": rates["backbone"], "img/s": speed})

    def _evaluate(self, step: int, journal: Journal, metrics: TrainingMetrics) -> dict[str, VerificationResult]:
        results = evaluate_sets(self.config, self.backbone, self.sets, self.place, self.precision)
        for name, result in results.items():
            metrics.record_verification(name, result.accuracy)
            journal.record("evaluation", step, set=name, **result.summary())
            journal.say(f"step {step}/{self.steps}  {describe(name, result)}")
        return results


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


def verification_sets(config: Config) -> dict[str, Path]:
    """The configured verification files by name; relative ones start at the data's folder.

    Raises:
        ConfigError: one isn't there, or two have the same name.
    """
    place = Path(config.data.path).expanduser()
    base = place if place.is_dir() else place.parent
    sets: dict[str, Path] = {}
    for given in config.evaluate.sets:
        path = base / given
        if not path.is_file():
            raise ConfigError(f"evaluate.sets names {given!r}, but {path} is no file: correct the name, or data.path")
        if path.stem in sets:
            raise ConfigError(f"evaluate.sets names two files {path.stem!r}: expected each name once")
        sets[path.stem] = path
    return sets


def evaluate_saved(config: Config, run: Path, place: Place) -> dict[str, VerificationResult]:
    """Verification of a run's saved model on ``evaluate.sets``, by set. Collective.

    Raises:
        ConfigError: no set is configured.
        CheckpointError: the run holds no model, or another one than its configuration says.
    """
    precision = agreed(lambda: build.choose_precision(config, place.device))
    sets = agreed(lambda: verification_sets(config))
    if not sets:
        raise ConfigError("evaluate.sets is empty, expected verification files: add evaluate.sets='[lfw.bin]'")
    backbone = agreed(lambda: build.build_backbone(config, place))
    agreed(lambda: load_backbone(run / "model", backbone))
    return evaluate_sets(config, backbone, sets, place, precision)


def evaluate_sets(
    config: Config, backbone: nn.Module, sets: dict[str, Path], place: Place, precision: torch.dtype
) -> dict[str, VerificationResult]:
    """Verification on all ranks, by set. Collective."""
    decode = functools.partial(decode_images, image_size=config.data.image_size, threads=config.data.threads)
    return {
        name: evaluate_pairs(
            backbone,
            path,
            decode=decode,
            batch_size=config.evaluate.batch_size,
            device=place.device,
            flip=config.evaluate.flip,
            autocast_dtype=None if precision == torch.float32 else precision,
        )
        for name, path in sets.items()
    }


def describe(name: str, result: VerificationResult) -> str:
    """A verification in a line."""
    rates = "  ".join(
        f"TAR@{far:g} {'too few pairs' if tar != tar else f'{tar:.4f}'}" for far, tar in result.tar_at_far.items()
    )
    return f"{name}: accuracy {result.accuracy:.4f} +- {result.accuracy_std:.4f}  AUC {result.auc:.4f}  {rates}"


def _figures(loss: torch.Tensor | None, stats: HeadStats | None) -> dict[str, Any]:
    """The step's numbers; None where it was skipped."""
    if loss is None or stats is None:
        names = ("loss", "target_cosine", "support_vectors_per_sample", "sampled_classes")
        return dict.fromkeys(names)
    return {
        "loss": float(loss),
        "target_cosine": float(stats.target_cosine),
        "support_vectors_per_sample": None if stats.support_vectors is None else float(stats.support_vectors),
        "sampled_classes": stats.sampled_classes,
    }
