"""The sections of the configuration that say how a run goes: the loop, its commits, its metrics, its evaluation."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from partial_fc.config_reader import Contradiction
from partial_fc.config_types import AboveOne, Count, Positive, Section

# A part of a host's name; underscores are in names of containers and pods.
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


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
    """Address to listen on; 0.0.0.0 for a Prometheus on another machine (:: with IPv6). Whoever reaches the port can
    read the metrics, unless tls_client_ca or user asks who he is."""
    advertise: Annotated[str, Field(min_length=1)] | None = None
    """Name or address by which Prometheus reaches this machine, for train.run_dir/targets; null: address, or where that
    is 0.0.0.0 or ::, the machine's address towards the rendezvous host."""
    tls_certificate: Annotated[str, Field(min_length=1)] | None = None
    """PEM file with the certificate (and those between it and the root), for HTTPS; read again when it changes. Null:
    HTTP."""
    tls_key: Annotated[str, Field(min_length=1)] | None = None
    """PEM file with its private key, without a passphrase."""
    tls_client_ca: Annotated[str, Field(min_length=1)] | None = None
    """PEM file with the authorities that a client's certificate must come from; null: clients need none."""
    user: Annotated[str, Field(pattern=r"^[^:]+$")] | None = None
    """User of HTTP's basic authentication, which hides nothing from the network without TLS; null: none is asked
    for."""
    password_file: Annotated[str, Field(min_length=1)] | None = None
    """File whose first line is the user's password."""


def metrics_contradictions(metrics: MetricsConfig) -> Iterator[Contradiction]:
    """What no single value of the section shows, and what a type can't say."""
    pairs = [("tls_certificate", "tls_key"), ("tls_key", "tls_certificate")]
    pairs += [("user", "password_file"), ("password_file", "user"), ("tls_client_ca", "tls_certificate")]
    for key, other in pairs:
        if getattr(metrics, key) is not None and getattr(metrics, other) is None:
            text = f"got {getattr(metrics, key)}, expected metrics.{other} with it"
            yield Contradiction((f"metrics.{key}", f"metrics.{other}"), text)
    if not _is_host(metrics.address, unspecified=True):
        text = f"got {metrics.address}, expected an address or a name of this machine, without port or brackets"
        yield Contradiction(("metrics.address",), text)
    if metrics.advertise is not None and not _is_host(metrics.advertise):
        text = f"got {metrics.advertise}, expected a host's name or address, without scheme, port or brackets"
        yield Contradiction(("metrics.advertise",), text)


def _is_host(text: str, *, unspecified: bool = False) -> bool:
    try:
        # 0.0.0.0 is where one listens; nobody can be reached there.
        return not ipaddress.ip_address(text).is_unspecified or unspecified
    except ValueError:
        return len(text) <= 253 and all(_LABEL.fullmatch(label) for label in text.removesuffix(".").split("."))


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
