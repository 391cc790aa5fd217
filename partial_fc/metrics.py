"""What a training rank tells Prometheus while it runs: one registry and one HTTP endpoint a rank.

Each rank has its own endpoint, so a scrape target is a rank, ``up`` tells which ranks live, and rank is no label here:
what each rank counts can be summed over the targets. Numbers come in as plain numbers. This module knows neither head
nor trainer and never reads a tensor; a caller on a GPU passes values when it synchronises anyway.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

from partial_fc.collectives import COLLECTIVES
from partial_fc.errors import ConfigError
from partial_fc.machine import host_memory
from partial_fc.metrics_server import MetricsServer, Tls

PHASES = (
    "data",
    "backbone_forward",
    "head_forward",
    "head_backward",
    "backbone_backward",
    "optimizer",
    "collectives",
)
GROUPS = ("backbone", "head")
# The head's, and the sum that DistributedDataParallel makes.
SENT = (*COLLECTIVES, "backbone_gradient")
# Those of the data stream (data.faults), which say what they mean.
DECODE_ERROR_KINDS = ("record", "label", "empty", "oversized", "image")
# How near: the nearest class centre that isn't a sample's own, the second, ...
NEAREST = (1, 5)
GPU_MEMORY = ("allocated", "reserved", "peak")
# From a head on a GPU (a few ms) to a backbone on CPUs (tens of seconds).
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

# What record_figures takes, by name.
_MEASURED = {
    "loss": "Mean loss of the global batch of the last step that was read.",
    "target_cosine": "Mean cosine of embeddings and their own class centre, over the global batch.",
    "support_vectors_per_sample": "Mean number of support vectors of a sample, over the global batch.",
    "support_vector_share": "Share (0 to 1) of the global batch's samples with at least one support vector.",
    "sampled_classes": "Classes of this rank's shard that the last step walked.",
    "positive_classes": "Classes of this rank's shard that the last step's global batch has.",
    "nearest_accuracy": "Share (0 to 1) of some samples whose own class centre is the nearest of all; at log steps.",
    "loss_scale": "Factor of the loss in fp16, else 1.",
    "epoch": "Passes over the data that the run has done.",
    "reached_step": "Optimizer steps that the run has done, those before this process started included.",
    "data_queue_batches": "Batches that are ready ahead of the training (with DALI: read, for it to decode).",
    "data_queue_capacity": "Batches that may be ready ahead.",
}

_log = logging.getLogger(__name__)


class TrainingMetrics:
    """The metrics of one rank, on a registry of its own.

    Every series exists from the start; a value that nobody has measured yet is NaN, and a counter 0. Counters count
    what this rank did since its process started, so a rate over the sum of all targets is the job's.

    Args:
        rank: this process among all ranks.
        world_size: number of ranks.
        local_rank: this process among the ranks of its machine; the endpoint's port is the base port plus this.
        decode_error_kinds: the label values of ``partial_fc_decode_errors_total``; any other kind counts as ``other``.
        info: labels of ``partial_fc_run_info``, such as versions.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        decode_error_kinds: Sequence[str] = DECODE_ERROR_KINDS,
        info: Mapping[str, str] | None = None,
    ) -> None:
        self.registry = CollectorRegistry()
        self._local_rank = local_rank
        self._server: MetricsServer | None = None
        self._stalls: Callable[[], bool] = lambda: False
        self._kinds = frozenset(decode_error_kinds)
        self._before: dict[tuple[str, str], int] = {}

        self._measured = {name: self._gauge(name, text) for name, text in _MEASURED.items()}
        self._learning_rate = self._gauge("learning_rate", "Learning rate of the last step.", "group")
        self._gradient_norm = self._gauge(
            "gradient_norm",
            "Norm of the last step's gradient before clipping; the head's is that of this rank's shard, at log steps.",
            "group",
        )
        self._centre_norm = self._gauge(
            "centre_norm", "Smallest and largest norm of the class centres that this rank last walked.", "bound"
        )
        self._nearest = self._gauge(
            "nearest_cosine",
            "Mean cosine of some samples with the n-th nearest class centre but their own, of all; at log steps.",
            "nearest",
        )
        self._accuracy = self._gauge("verification_accuracy", "Last verification accuracy (0 to 1) of a set.", "set")
        self._evaluation_seconds = self._gauge("evaluation_seconds", "Seconds that the last evaluation took, all sets.")
        self._evaluations = self._counter("evaluations", "Evaluations since this process started.")
        self._planned = self._gauge("planned_steps", "Optimizer steps of the whole run.")
        self._gauge("rank", "This process among all ranks.").set(rank)
        self._gauge("world_size", "Number of ranks of the job.").set(world_size)
        self._steps = self._counter("steps", "Training steps done, skipped ones included.")
        self._skipped = self._counter("skipped_steps", "Steps without an update because a value was not finite.")
        self._samples = self._counter("samples", "Samples that this rank has trained on.")
        self._decode_errors = self._counter("decode_errors", "Samples of this rank replaced as unreadable.", "kind")
        self._sent = self._counter(
            "collective_bytes", "Bytes that this rank sent, as ring algorithms send them.", "collective"
        )
        self._gpu_memory = self._gauge(
            "gpu_memory_bytes", "Memory of PyTorch's allocator on this rank's GPU; 0 on a CPU.", "kind"
        )
        self._commits = self._counter("commits", "Commits of the run's state since this process started.")
        self._failed_commits = self._counter(
            "failed_commits", "Commits that could not be written; they are tried again."
        )
        self._committed_step = self._gauge("committed_step", "Steps done at the last commit.")
        self._commit_time = self._gauge("commit_timestamp_seconds", "When the last commit was done (Unix time).")
        self._commit_seconds = self._gauge("commit_seconds", "Seconds from the last commit's copy until it was there.")
        self._copy_seconds = self._gauge("commit_copy_seconds", "Seconds that its copy delayed the training.")
        self._commit_bytes = self._gauge("commit_bytes", "Bytes of the last commit, those of all ranks.")
        self._resumed_step = self._gauge("resumed_step", "Steps done at the commit that this process went on from.")
        self._restarts = self._gauge("restarts", "How often the run was started again before its end.")
        self._rollbacks = self._counter("rollbacks", "Returns to the last commit after a divergence.")
        self._gauge("stalled", "1 while this rank makes no progress, else 0.").set_function(
            lambda: float(self._stalls())
        )
        self._phases = Histogram(
            "partial_fc_step_seconds",
            "Seconds of a step by phase; waiting for the head's collectives is a phase of its own.",
            ["phase"],
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        available = self._gauge("host_memory_available_bytes", "Memory that programs on this machine can still have.")
        limit = self._gauge("host_memory_limit_bytes", "Memory of this machine, or of its control group (container).")
        available.set_function(lambda: _of_host("available"))
        limit.set_function(lambda: _of_host("limit"))
        build = {"version": "", "torch": "", "device": "", **(info or {})}
        self._gauge("run_info", "1; the labels say what trains.", *build).labels(**build).set(1)
        self._declare()
        # Memory, CPU seconds, open files: what leaks over days shows here.
        ProcessCollector(registry=self.registry)

    def _declare(self) -> None:
        """Make every series that there will be."""
        of_commits = (self._commit_time, self._commit_seconds, self._copy_seconds, self._commit_bytes)
        others = (self._committed_step, self._resumed_step, self._planned, self._restarts, self._evaluation_seconds)
        for gauge in (*self._measured.values(), *of_commits, *others):
            gauge.set(math.nan)
        for group in GROUPS:
            self._learning_rate.labels(group).set(math.nan)
            self._gradient_norm.labels(group).set(math.nan)
        for bound in ("min", "max"):
            self._centre_norm.labels(bound).set(math.nan)
        for nearest in NEAREST:
            self._nearest.labels(str(nearest)).set(math.nan)
        for kind in (*sorted(self._kinds), "other"):
            self._decode_errors.labels(kind)
        for kind in GPU_MEMORY:
            self._gpu_memory.labels(kind).set(0)
        for name in SENT:
            self._sent.labels(name)
        for phase in PHASES:
            self._phases.labels(phase)

    def __enter__(self) -> TrainingMetrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def observe_phase(self, phase: str, seconds: float) -> None:
        """Count the seconds that one step spent in a phase, one of ``PHASES``.

        Raises:
            ConfigError: for another phase: label values are a fixed set.
        """
        if phase not in PHASES:
            raise ConfigError(f"phase is {phase!r}: expected one of {', '.join(PHASES)}")
        self._phases.labels(phase).observe(seconds)

    def record_step(self, samples: int, reached_step: int) -> None:
        """Count a step.

        Args:
            samples: of this rank.
            reached_step: steps that the run has done by now.
        """
        self._samples.inc(samples)
        self._steps.inc()
        self._measured["reached_step"].set(reached_step)

    def record_figures(
        self,
        measured: Mapping[str, float | None],
        *,
        skipped: int = 0,
        learning_rates: Mapping[str, float] | None = None,
        gradient_norms: Mapping[str, float] | None = None,
        centre_norms: Sequence[float] | None = None,
    ) -> None:
        """Set what was measured since the last call. What is None, or isn't given, stays as it was.

        Args:
            measured: by name, the gauges of no label, such as ``loss``.
            skipped: steps without an update.
            learning_rates: by group, one of ``GROUPS``.
            gradient_norms: likewise.
            centre_norms: smallest and largest norm of the centres that this rank walked.

        Raises:
            ConfigError: for another group or name: label values and metrics are a fixed set.
        """
        self._skipped.inc(skipped)
        for name, value in measured.items():
            if name not in self._measured:
                raise ConfigError(f"a measured value is {name!r}: expected one of {', '.join(self._measured)}")
            if value is not None:
                self._measured[name].set(value)
        for gauge, by_group in ((self._learning_rate, learning_rates), (self._gradient_norm, gradient_norms)):
            for group, value in (by_group or {}).items():
                if group not in GROUPS:
                    raise ConfigError(f"group is {group!r}: expected one of {', '.join(GROUPS)}")
                gauge.labels(group).set(value)
        for bound, value in zip(("min", "max"), centre_norms or (), strict=False):
            self._centre_norm.labels(bound).set(value)

    def record_nearest(self, cosines: Mapping[int, float], accuracy: float) -> None:
        """Set how some samples lie among all class centres.

        Args:
            cosines: by ``NEAREST``, the mean cosine with the n-th nearest centre but the sample's own.
            accuracy: share (0 to 1) of the samples whose own centre is the nearest.
        """
        for nearest in NEAREST:
            self._nearest.labels(str(nearest)).set(cosines[nearest])
        self._measured["nearest_accuracy"].set(accuracy)

    def record_decode_errors(self, so_far: Mapping[str, int]) -> None:
        """Count samples that were replaced because they could not be read.

        Args:
            so_far: by kind, the number since the data stream was opened, as the stream counts them. A number below that
                of the last call comes from a new stream. A kind that was not declared counts as ``other``.
        """
        for kind, count in so_far.items():
            self._decode_errors.labels(kind if kind in self._kinds else "other").inc(self._new("error", kind, count))

    def record_sent(self, so_far: Mapping[str, int]) -> None:
        """Count bytes that this rank sent.

        Args:
            so_far: by collective (``SENT``), the number since the process started. Others are left out.
        """
        for name, count in so_far.items():
            if name in SENT:
                self._sent.labels(name).inc(self._new("sent", name, count))

    def _new(self, kind: str, name: str, count: int) -> int:
        """What was added to a count since it was last given."""
        before = self._before.get((kind, name), 0)
        self._before[kind, name] = count
        return count - before if count >= before else count

    def record_gpu_memory(self, *, allocated: int, reserved: int, peak: int) -> None:
        """Set what PyTorch's allocator has: bytes of tensors, bytes that it holds, and most that tensors had."""
        for kind, value in zip(GPU_MEMORY, (allocated, reserved, peak), strict=True):
            self._gpu_memory.labels(kind).set(value)

    def record_evaluation(self, accuracies: Mapping[str, float], seconds: float) -> None:
        """Count an evaluation.

        Args:
            accuracies: (0 to 1) by verification set; names are those of the configuration, never free text.
            seconds: that all of it took.
        """
        for name, accuracy in accuracies.items():
            self._accuracy.labels(name).set(accuracy)
        self._evaluations.inc()
        self._evaluation_seconds.set(seconds)

    def record_commit(self, step: int, seconds: float, *, copy_seconds: float, size: int, failed: bool) -> None:
        """Count a commit.

        Args:
            step: steps done at it.
            seconds: from its copy until it was there, or failed.
            copy_seconds: that it delayed the training.
            size: bytes, of all ranks.
            failed: whether it could not be written.
        """
        if failed:
            self._failed_commits.inc()
            return
        self._commits.inc()
        self._committed_step.set(step)
        self._commit_time.set_to_current_time()
        self._commit_seconds.set(seconds)
        self._copy_seconds.set(copy_seconds)
        self._commit_bytes.set(size)

    def record_resume(self, step: int) -> None:
        """Set the step of the commit that this process went on from."""
        self._resumed_step.set(step)
        self._committed_step.set(step)

    def record_start(self, *, planned_steps: int, restarts: int) -> None:
        """Set the run's length in steps, and how often it was started again."""
        self._planned.set(planned_steps)
        self._restarts.set(restarts)

    def record_rollback(self) -> None:
        """Count a return to the last commit after a divergence."""
        self._rollbacks.inc()

    def watch_stalls(self, stalled: Callable[[], bool]) -> None:
        """Ask ``stalled`` at each scrape whether this rank makes no progress."""
        self._stalls = stalled

    def start(
        self,
        port: int,
        address: str = "127.0.0.1",
        *,
        tls: Tls | None = None,
        credentials: tuple[str, str] | None = None,
    ) -> str | None:
        """Serve the metrics over HTTP from threads.

        An endpoint that can't be opened doesn't end a training that may have waited days for its machines: it is said
        once, as a warning, and the run goes on without.

        Args:
            port: the base port; this rank serves on ``port + local_rank``. 0: any free port.
            address: where to listen. The default serves this machine only. A Prometheus server on another host needs
                the address of a network interface, or ``0.0.0.0`` for all; whoever reaches it can read the metrics.
            tls: encrypt.
            credentials: user and password that are asked for.

        Returns:
            The URL, or None where the endpoint could not be opened.

        Raises:
            ConfigError: where it is serving already, for a port outside 0 .. 65535, or for certificates that can't be
                used.
        """
        if self._server is not None:
            raise ConfigError(f"the metrics are served already, at {self.url}: call close() first")
        own = port + self._local_rank if port else 0
        if not 0 <= port <= own <= 65535:
            raise ConfigError(
                f"the metrics port is {port} and the local rank {self._local_rank}: "
                "expected a sum in 1 .. 65535, or port 0"
            )
        server = MetricsServer(
            self.registry, port=own, address=address, tls=tls, credentials=credentials, healthy=self._trouble
        )
        try:
            server.start()
        except OSError as error:
            _log.warning(
                "no metrics from this rank: %s:%d can't be opened (%s); training goes on without; "
                "choose another base port for the next run",
                address,
                own,
                error.strerror or error,
            )
            return None
        self._server = server
        return self.url

    @property
    def url(self) -> str | None:
        """Where the metrics are served; None while they are not."""
        return None if self._server is None else self._server.url

    @property
    def port(self) -> int | None:
        """The port that they are served on; None while they are not."""
        return None if self._server is None else self._server.port

    def close(self) -> None:
        """Stop serving and free the port. Closing twice is allowed; a later :meth:`start` serves again."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _trouble(self) -> str | None:
        return "this rank makes no progress" if self._stalls() else None

    def _gauge(self, name: str, text: str, *labels: str) -> Any:
        return Gauge(f"partial_fc_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Any:
        return Counter(f"partial_fc_{name}_total", text, labels, registry=self.registry)


def _of_host(which: str) -> float:
    memory = host_memory()
    return math.nan if memory is None else float(getattr(memory, which))
