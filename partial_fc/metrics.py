"""What a training rank tells Prometheus while it runs: one registry and one HTTP endpoint a rank.

Each rank has its own endpoint, so a scrape target is a rank, ``up`` tells which ranks live, and rank is no label here:
what each rank counts can be summed over the targets. Numbers come in as plain numbers. This module knows neither head
nor trainer and never reads a tensor; a caller on a GPU passes values when it synchronises anyway.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.process_collector import ProcessCollector

from partial_fc.errors import ConfigError

PHASES = ("data", "backbone", "head", "optimizer")
LEARNING_RATE_GROUPS = ("backbone", "head")
# Those of the data stream (data.faults), which say what they mean.
DECODE_ERROR_KINDS = ("record", "label", "empty", "oversized", "image")
# From a head on a GPU (a few ms) to a backbone on CPUs (tens of seconds).
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

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
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        decode_error_kinds: Sequence[str] = DECODE_ERROR_KINDS,
    ) -> None:
        self.registry = CollectorRegistry()
        self._local_rank = local_rank
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self._kinds = frozenset(decode_error_kinds)
        self._errors_before: dict[str, int] = {}

        self._loss = self._gauge("loss", "Mean loss of the global batch of the last step that was read.")
        self._target_cosine = self._gauge("target_cosine", "Mean cosine of embeddings and their own class centre.")
        self._support_vectors = self._gauge("support_vectors_per_sample", "Mean number of support vectors of a sample.")
        self._sampled = self._gauge("sampled_classes", "Classes of this rank's shard that the last step sampled.")
        self._learning_rate = self._gauge("learning_rate", "Learning rate of the last step.", "group")
        self._accuracy = self._gauge("verification_accuracy", "Last verification accuracy (0 to 1) of a set.", "set")
        self._gauge("rank", "This process among all ranks.").set(rank)
        self._gauge("world_size", "Number of ranks of the job.").set(world_size)
        self._steps = self._counter("steps", "Training steps done, skipped ones included.")
        self._skipped = self._counter("skipped_steps", "Steps without an update because a value was not finite.")
        self._samples = self._counter("samples", "Samples that this rank has trained on.")
        self._decode_errors = self._counter("decode_errors", "Samples of this rank replaced as unreadable.", "kind")
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
        self._rollbacks = self._counter("rollbacks", "Returns to the last commit after a divergence.")
        self._stalled = self._gauge("stalled", "1 while this rank makes no progress, else 0.")
        self._phases = Histogram(
            "partial_fc_step_seconds",
            "Seconds of a step by phase.",
            ["phase"],
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        measured = (self._loss, self._target_cosine, self._support_vectors, self._sampled, self._committed_step)
        of_commits = (self._commit_time, self._commit_seconds, self._copy_seconds, self._commit_bytes)
        for gauge in (*measured, *of_commits):
            gauge.set(math.nan)
        for group in LEARNING_RATE_GROUPS:
            self._learning_rate.labels(group).set(math.nan)
        for kind in (*decode_error_kinds, "other"):
            self._decode_errors.labels(kind)
        for phase in PHASES:
            self._phases.labels(phase)
        # Memory, CPU seconds, open files: what leaks over days shows here.
        ProcessCollector(registry=self.registry)

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

    def record_step(
        self,
        samples: int,
        *,
        steps: int = 1,
        skipped: int = 0,
        loss: float | None = None,
        support_vectors_per_sample: float | None = None,
        target_cosine: float | None = None,
        sampled_classes: float | None = None,
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        """Count steps; and set what was measured with them. A value that is None stays as it was.

        Args:
            samples: samples of this rank in these steps.
            steps: steps since the last call, those without an update included.
            skipped: how many of them were without an update.
            loss: mean over the global batch.
            support_vectors_per_sample: mean over the global batch.
            target_cosine: mean over the global batch.
            sampled_classes: of this rank's shard.
            learning_rates: by group, one of ``LEARNING_RATE_GROUPS``.

        Raises:
            ConfigError: for another group.
        """
        self._samples.inc(samples)
        self._steps.inc(steps)
        self._skipped.inc(skipped)
        measured = (
            (self._loss, loss),
            (self._support_vectors, support_vectors_per_sample),
            (self._target_cosine, target_cosine),
            (self._sampled, sampled_classes),
        )
        for gauge, value in measured:
            if value is not None:
                gauge.set(value)
        for group, rate in (learning_rates or {}).items():
            if group not in LEARNING_RATE_GROUPS:
                raise ConfigError(f"group is {group!r}: expected one of {', '.join(LEARNING_RATE_GROUPS)}")
            self._learning_rate.labels(group).set(rate)

    def record_decode_errors(self, so_far: Mapping[str, int]) -> None:
        """Count samples that were replaced because they could not be read.

        Args:
            so_far: by kind, the number since the data stream was opened, as the stream counts them. A number below that
                of the last call comes from a new stream. A kind that was not declared counts as ``other``.
        """
        for kind, count in so_far.items():
            before = self._errors_before.get(kind, 0)
            self._errors_before[kind] = count
            new = count - before if count >= before else count
            self._decode_errors.labels(kind if kind in self._kinds else "other").inc(new)

    def record_verification(self, set_name: str, accuracy: float) -> None:
        """Set the accuracy (0 to 1) of a verification set. Names are those of the configuration, never free text."""
        self._accuracy.labels(set_name).set(accuracy)

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

    def record_rollback(self) -> None:
        """Count a return to the last commit after a divergence."""
        self._rollbacks.inc()

    def watch_stalls(self, stalled: Callable[[], bool]) -> None:
        """Ask ``stalled`` at each scrape whether this rank makes no progress."""
        self._stalled.set_function(lambda: float(stalled()))

    def start(self, port: int, address: str = "127.0.0.1") -> str | None:
        """Serve the metrics over HTTP from a thread.

        An endpoint that can't be opened doesn't end a training that may have waited days for its machines: it is said
        once, as a warning, and the run goes on without.

        Args:
            port: the base port; this rank serves on ``port + local_rank``. 0: any free port.
            address: where to listen. The default serves this machine only. A Prometheus server on another host needs
                the address of a network interface, or ``0.0.0.0`` for all; whoever reaches it can read the metrics.

        Returns:
            The URL, or None where the endpoint could not be opened.

        Raises:
            ConfigError: where it is serving already, or for a port outside 0 .. 65535.
        """
        if self._server is not None:
            raise ConfigError(f"the metrics are served already, at {self.url}: call close() first")
        own = port + self._local_rank if port else 0
        if not 0 <= port <= own <= 65535:
            raise ConfigError(
                f"the metrics port is {port} and the local rank {self._local_rank}: "
                "expected a sum in 1 .. 65535, or port 0"
            )
        try:
            self._server, self._thread = start_http_server(own, address, self.registry)
        except OSError as error:
            _log.warning(
                "no metrics from this rank: %s:%d can't be opened (%s); training goes on without; "
                "choose another base port for the next run",
                address,
                own,
                error.strerror or error,
            )
            return None
        return self.url

    @property
    def url(self) -> str | None:
        """Where the metrics are served; None while they are not."""
        if self._server is None:
            return None
        host, port = self._server.server_address[:2]
        return f"http://[{host}]:{port}/metrics" if ":" in host else f"http://{host}:{port}/metrics"

    def close(self) -> None:
        """Stop serving and free the port. Closing twice is allowed; a later :meth:`start` serves again."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server = self._thread = None

    def _gauge(self, name: str, text: str, *labels: str) -> Any:
        return Gauge(f"partial_fc_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Any:
        return Counter(f"partial_fc_{name}_total", text, labels, registry=self.registry)
