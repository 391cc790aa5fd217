"""A rank's metrics endpoint, and the file by which Prometheus finds those of all ranks."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch.distributed as dist

from partial_fc.build import Place
from partial_fc.config import Config
from partial_fc.metrics import TrainingMetrics
from partial_fc.metrics_server import Tls, read_password
from partial_fc.ranks import agreed
from partial_fc.targets import reachable_host, targets_of, write_targets

_log = logging.getLogger(__name__)


def open_endpoint(config: Config, place: Place, metrics: TrainingMetrics, folder: Path) -> None:
    """Serve a rank's metrics, and write the run's file of :mod:`partial_fc.targets`. Collective.

    A port that can't be opened is a warning.

    Raises:
        ConfigError: on every rank, where a certificate or password of one can't be used.
    """
    section = config.metrics
    agreed(lambda: _start(config, metrics))
    host = reachable_host(section.address, section.advertise, os.environ.get("MASTER_ADDR"))
    endpoints = [(host, metrics.port)] * place.world_size
    if dist.is_initialized():
        dist.all_gather_object(endpoints, endpoints[0])
    if place.rank == 0:
        # Not the run's name, which others after it have, too.
        targets = targets_of(endpoints, run=folder.name, tls=section.tls_certificate is not None)
        write_targets(folder, targets)
        if not targets:
            _log.warning("no rank serves metrics: Prometheus won't know of this run, and no alert will tell of it")


def _start(config: Config, metrics: TrainingMetrics) -> None:
    section = config.metrics
    tls, credentials = None, None
    if section.tls_certificate is not None and section.tls_key is not None:
        tls = Tls(section.tls_certificate, section.tls_key, section.tls_client_ca)
    if section.user is not None and section.password_file is not None:
        credentials = section.user, read_password(section.password_file)
    metrics.start(section.port, section.address, tls=tls, credentials=credentials)
