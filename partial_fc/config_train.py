"""The sections of the configuration that say how a run goes: the loop, its commits, its metrics, its evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from partial_fc.config_types import AboveOne, Count, Positive, Section


class TrainConfig(Section):
    """The loop."""

    batch_size: Count = 512
    """Samples of an optimizer step, over all ranks and accumulated micro batches."""
    steps: Count | None = None
    """Optimizer steps of the run; give this or epochs."""
    epochs: Positive | None = None
    """Length of the run in passes over the data; give this or steps."""
    accumulate: Count = 1
    """Micro batches whose gradients are summed for one step."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Type of the backbone's products (tf32: of fp32 products on GPUs); auto: bf16 on GPUs that have it, else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: on GPUs where there are any."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Key of everything that is random."""
    run_dir: Annotated[str, Field(min_length=1)] = "runs"
    """Folder of the runs' folders."""
    name: Annotated[str, Field(pattern=r"^[^/.][^/]*$")] | None = None
    """Name of the run's folder; null: that of the configuration file."""
    log_every: Count = 50
    """Steps between two lines of the log."""
    resume: Annotated[str, Field(min_length=1)] = "auto"
    """auto: an unfinished run of this name goes on from its last commit, else a new one starts; never: a new run; or
    the folder of a commit, or of another run, which a new run goes on from."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """After a NaN or infinity in a step: stop the run, or leave the step out."""
    nonfinite_limit: Count = 10
    """So many steps in a row without an update count as a divergence."""
    divergence_factor: AboveOne | None = None
    """A loss above so many times its running median counts as a divergence, too; null: none does."""
    divergence_window: Annotated[int, Field(ge=10)] = 100
    """Steps whose losses that median is of."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """After a divergence: stop the run, or go back to its last commit with a lower learning rate."""
    rollback_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """What each such return multiplies the learning rates by, for the rest of the run."""
    max_rollbacks: Count = 3
    """So many returns are tried before the run stops."""
    timeout_seconds: Positive = 600.0
    """Seconds after which a collective that a rank doesn't join fails."""
    stall_seconds: Positive | None = None
    """Seconds without progress after which a rank says where it is and whom it waits for; null: half of
    timeout_seconds."""


class CheckpointConfig(Section):
    """Commits of the whole state, which a run goes on from."""

    every_steps: Count | None = None
    """Steps between two commits; null: by time only."""
    every_minutes: Positive | None = 15.0
    """Minutes between two commits; null: by steps only."""
    keep_last: Count = 2
    """How many of the last commits are kept."""
    keep_best: bool = True
    """Keep the commit with the best mean verification accuracy, too; each new best is committed."""
    background: bool = True
    """Write while the training goes on, from a copy in the host's memory; false: the training waits."""
    retry_seconds: Positive = 60.0
    """Seconds after which a commit that failed (a full disk) is tried again."""


class MetricsConfig(Section):
    """The Prometheus endpoint of each rank."""

    enabled: bool = True
    """Whether to serve metrics."""
    port: Annotated[int, Field(ge=1, le=65535)] = 9400
    """Port of local rank 0; local rank r serves on port + r."""
    address: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for a Prometheus on another machine."""


class EvaluateConfig(Section):
    """Verification during and after training."""

    sets: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Verification .bin files; relative paths start at data.path."""
    every_steps: Count | None = None
    """Steps between two evaluations; null: only at the end."""
    batch_size: Count = 256
    """Images that a rank embeds at once."""
    flip: bool = True
    """Add the embedding of the mirrored image, as InsightFace does."""
