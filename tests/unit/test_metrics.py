from __future__ import annotations

import logging
import math
import re
import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from partial_fc.errors import ConfigError
from partial_fc.metrics import PHASES, STEP_BUCKETS, TrainingMetrics

SERIES = {
    "loss": "gauge",
    "samples": "counter",
    "steps": "counter",
    "skipped_steps": "counter",
    "step_seconds": "histogram",
    "support_vectors_per_sample": "gauge",
    "target_cosine": "gauge",
    "learning_rate": "gauge",
    "sampled_classes": "gauge",
    "decode_errors": "counter",
    "verification_accuracy": "gauge",
    "evaluations": "counter",
    "evaluation_seconds": "gauge",
    "reached_step": "gauge",
    "planned_steps": "gauge",
    "epoch": "gauge",
    "gradient_norm": "gauge",
    "loss_scale": "gauge",
    "nearest_cosine": "gauge",
    "nearest_accuracy": "gauge",
    "support_vector_share": "gauge",
    "positive_classes": "gauge",
    "centre_norm": "gauge",
    "collective_bytes": "counter",
    "data_queue_batches": "gauge",
    "data_queue_capacity": "gauge",
    "gpu_memory_bytes": "gauge",
    "host_memory_available_bytes": "gauge",
    "host_memory_limit_bytes": "gauge",
    "restarts": "gauge",
    "run_info": "gauge",
    "rank": "gauge",
    "world_size": "gauge",
    "commits": "counter",
    "failed_commits": "counter",
    "committed_step": "gauge",
    "commit_timestamp_seconds": "gauge",
    "commit_seconds": "gauge",
    "commit_copy_seconds": "gauge",
    "commit_bytes": "gauge",
    "resumed_step": "gauge",
    "rollbacks": "counter",
    "stalled": "gauge",
}


def families(metrics: TrainingMetrics) -> dict[str, Metric]:
    return {
        family.name: family for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
    }


def value(metrics: TrainingMetrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(f"partial_fc_{name}", labels)
    assert found is not None, name
    return found


def a_step(metrics: TrainingMetrics) -> None:
    metrics.record_step(32, 1)
    metrics.record_figures(
        {"loss": 7.5, "support_vectors_per_sample": 12.25, "target_cosine": 0.4, "sampled_classes": 1000},
        learning_rates={"backbone": 0.1, "head": 0.2},
    )


def test_every_series_is_there_from_the_start_with_its_type() -> None:
    with TrainingMetrics() as metrics:
        found = families(metrics)
        for name, kind in SERIES.items():
            assert found[f"partial_fc_{name}"].type == kind
            assert found[f"partial_fc_{name}"].documentation.endswith(".")
        for name in ("loss", "target_cosine", "support_vectors_per_sample", "sampled_classes"):
            assert math.isnan(value(metrics, name))
        for name in ("samples_total", "steps_total", "skipped_steps_total"):
            assert value(metrics, name) == 0
        for kind in ("record", "label", "image", "other"):
            assert value(metrics, "decode_errors_total", kind=kind) == 0
        for phase in PHASES:
            assert value(metrics, "step_seconds_count", phase=phase) == 0


def test_commits_rollbacks_and_stalls_are_told() -> None:
    metrics = TrainingMetrics()
    assert math.isnan(value(metrics, "committed_step")) and value(metrics, "commits_total") == 0
    metrics.record_resume(40)
    assert value(metrics, "committed_step") == value(metrics, "resumed_step") == 40
    metrics.record_commit(60, 2.5, copy_seconds=0.25, size=1000, failed=False)
    metrics.record_commit(80, 9.0, copy_seconds=0.5, size=0, failed=True)
    assert value(metrics, "committed_step") == 60, "a failed one leaves the last"
    assert value(metrics, "commits_total") == 1 and value(metrics, "failed_commits_total") == 1
    assert value(metrics, "commit_seconds") == 2.5 and value(metrics, "commit_copy_seconds") == 0.25
    assert value(metrics, "commit_bytes") == 1000 and value(metrics, "commit_timestamp_seconds") > 1e9
    metrics.record_rollback()
    assert value(metrics, "rollbacks_total") == 1
    stalled = [False]
    metrics.watch_stalls(lambda: stalled[0])
    assert value(metrics, "stalled") == 0
    stalled[0] = True
    assert value(metrics, "stalled") == 1


def test_names_follow_the_conventions() -> None:
    metrics = TrainingMetrics()
    a_step(metrics)
    metrics.record_evaluation({"lfw": 0.99}, 12.5)
    for name, family in families(metrics).items():
        if name.startswith(("process_", "python_")):
            continue
        if name.endswith("_created"):  # the time at which a counter began, added by the client
            assert re.sub(r"_created$", "", name) in families(metrics)
            continue
        assert re.fullmatch(r"partial_fc(_[a-z]+)+", name)
        if name == "partial_fc_run_info":
            continue
        # The parser takes _total away from counters; nothing else may end like a part of a counter or histogram.
        assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_info"))
        assert not re.search(r"_(milliseconds|ms|minutes|hours|percent|counter|gauge|histogram|summary)(_|$)", name)
        samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        if family.type == "counter":
            assert {sample.name for sample in samples} == {f"{name}_total"}
        labels = {label for sample in samples for label in sample.labels}
        known = {"phase", "group", "kind", "set", "le", "bound", "nearest", "collective"}
        assert labels <= known


def test_a_step_is_counted_and_its_values_are_set() -> None:
    metrics = TrainingMetrics(rank=3, world_size=8, local_rank=1)
    a_step(metrics)
    for step in (2, 3, 4):
        metrics.record_step(32, step)
    metrics.record_figures({"target_cosine": None}, skipped=1)
    assert value(metrics, "samples_total") == 128
    assert value(metrics, "steps_total") == value(metrics, "reached_step") == 4
    assert value(metrics, "skipped_steps_total") == 1
    # What the second call did not measure stays.
    assert value(metrics, "loss") == 7.5
    assert value(metrics, "support_vectors_per_sample") == 12.25
    assert value(metrics, "target_cosine") == 0.4
    assert value(metrics, "sampled_classes") == 1000
    assert value(metrics, "learning_rate", group="backbone") == 0.1
    assert value(metrics, "learning_rate", group="head") == 0.2
    assert value(metrics, "rank") == 3 and value(metrics, "world_size") == 8


def test_what_was_measured_stays_until_it_is_measured_again() -> None:
    metrics = TrainingMetrics()
    metrics.record_step(4, 17)
    metrics.record_figures({"epoch": 1.5}, gradient_norms={"backbone": 2.5}, centre_norms=[0.5, 3.0])
    metrics.record_nearest({1: 0.4, 5: 0.3}, 0.75)
    metrics.record_figures({"epoch": None}, gradient_norms={"head": 7.0})
    assert value(metrics, "gradient_norm", group="backbone") == 2.5
    assert value(metrics, "gradient_norm", group="head") == 7.0
    assert value(metrics, "centre_norm", bound="min") == 0.5 and value(metrics, "centre_norm", bound="max") == 3.0
    assert value(metrics, "nearest_cosine", nearest="1") == 0.4
    assert value(metrics, "nearest_cosine", nearest="5") == 0.3
    assert value(metrics, "nearest_accuracy") == 0.75
    assert value(metrics, "epoch") == 1.5 and value(metrics, "reached_step") == 17


def test_bytes_memory_evaluations_and_starts_are_told() -> None:
    metrics = TrainingMetrics(info={"torch": "2.13", "device": "cpu"})
    metrics.record_sent({"embeddings": 100, "sums": 8, "another": 5})
    metrics.record_sent({"embeddings": 250, "sums": 8})
    assert value(metrics, "collective_bytes_total", collective="embeddings") == 250
    assert value(metrics, "collective_bytes_total", collective="sums") == 8
    assert "another" not in generate_latest(metrics.registry).decode()
    assert value(metrics, "gpu_memory_bytes", kind="peak") == 0
    metrics.record_gpu_memory(allocated=1, reserved=3, peak=2)
    assert [value(metrics, "gpu_memory_bytes", kind=kind) for kind in ("allocated", "reserved", "peak")] == [1, 3, 2]
    metrics.record_evaluation({"lfw": 0.9, "cfp": 0.8}, 4.0)
    assert value(metrics, "evaluations_total") == 1 and value(metrics, "evaluation_seconds") == 4
    assert value(metrics, "verification_accuracy", set="cfp") == 0.8
    metrics.record_start(planned_steps=100, restarts=3)
    assert value(metrics, "planned_steps") == 100 and value(metrics, "restarts") == 3
    assert value(metrics, "run_info", version="", torch="2.13", device="cpu") == 1
    assert 0 < value(metrics, "host_memory_available_bytes") <= value(metrics, "host_memory_limit_bytes")


def test_phases_are_histograms() -> None:
    metrics = TrainingMetrics()
    for seconds in (0.004, 0.02, 100.0):
        metrics.observe_phase("head_forward", seconds)
    assert value(metrics, "step_seconds_count", phase="head_forward") == 3
    assert value(metrics, "step_seconds_sum", phase="head_forward") == pytest.approx(100.024)
    assert value(metrics, "step_seconds_bucket", phase="head_forward", le="0.005") == 1
    assert value(metrics, "step_seconds_bucket", phase="head_forward", le="60.0") == 2
    assert value(metrics, "step_seconds_bucket", phase="head_forward", le="+Inf") == 3
    assert value(metrics, "step_seconds_count", phase="data") == 0
    assert list(STEP_BUCKETS) == sorted(STEP_BUCKETS)


def test_decode_errors_follow_the_count_of_the_stream() -> None:
    metrics = TrainingMetrics()
    metrics.record_decode_errors({"image": 2})
    metrics.record_decode_errors({"image": 5, "label": 1})
    assert value(metrics, "decode_errors_total", kind="image") == 5
    # A new stream begins at 0 again.
    metrics.record_decode_errors({"image": 1, "a sample's own text": 3})
    assert value(metrics, "decode_errors_total", kind="image") == 6
    assert value(metrics, "decode_errors_total", kind="label") == 1
    assert value(metrics, "decode_errors_total", kind="other") == 3
    assert "own text" not in generate_latest(metrics.registry).decode()


def test_labels_are_a_fixed_set() -> None:
    metrics = TrainingMetrics()
    with pytest.raises(ConfigError, match="phase is 'step 17': expected one of data, backbone_forward, "):
        metrics.observe_phase("step 17", 1.0)
    with pytest.raises(ConfigError, match="group is 'bias': expected one of backbone, head"):
        metrics.record_figures({}, learning_rates={"bias": 1.0})
    with pytest.raises(ConfigError, match="a measured value is 'los': expected one of loss, target_cosine"):
        metrics.record_figures({"los": 1.0})


def test_each_has_its_own_registry() -> None:
    first, second = TrainingMetrics(rank=0, world_size=2), TrainingMetrics(rank=1, world_size=2)
    first.record_step(7, 1)
    assert value(first, "samples_total") == 7 and value(second, "samples_total") == 0
    assert not [name for name in REGISTRY._names_to_collectors if name.startswith("partial_fc")]


def test_a_scrape_over_http() -> None:
    with TrainingMetrics() as metrics:
        url = metrics.start(0)
        assert url is not None and url == metrics.url and url.startswith("http://127.0.0.1:")
        a_step(metrics)
        metrics.record_evaluation({"omniglot_val": 0.93}, 3.5)
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            text = answer.read().decode()
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert samples[("partial_fc_loss",)] == 7.5
        assert samples[("partial_fc_samples_total",)] == 32
        assert samples[("partial_fc_verification_accuracy", "omniglot_val")] == 0.93
        assert samples[("process_resident_memory_bytes",)] > 0
        metrics.close()
        assert metrics.url is None
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url, timeout=10)
        # The port is free again, at once.
        port = int(url.split(":")[2].split("/")[0])
        assert metrics.start(port) == url
        metrics.close()
        metrics.close()


def test_the_port_is_the_base_port_and_the_local_rank() -> None:
    with TrainingMetrics(rank=1, world_size=2, local_rank=1) as metrics:
        for _ in range(20):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                free = probe.getsockname()[1]
            url = metrics.start(free - 1)
            if url is not None:
                break
        assert url == f"http://127.0.0.1:{free}/metrics"


def test_a_used_port_is_said_once_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with TrainingMetrics() as first, TrainingMetrics() as second:
        url = first.start(0)
        assert url is not None
        port = int(url.split(":")[2].split("/")[0])
        with caplog.at_level(logging.WARNING):
            assert second.start(port) is None
        assert len(caplog.records) == 1
        assert f"127.0.0.1:{port} can't be opened (Address already in use); training goes on" in caplog.text
        assert second.url is None
        a_step(second)
        second.observe_phase("data", 0.1)
        assert len(caplog.records) == 1


def test_an_address_of_another_machine_does_not_end_training(caplog: pytest.LogCaptureFixture) -> None:
    with TrainingMetrics() as metrics:
        assert metrics.start(0, "192.0.2.1") is None
    assert "192.0.2.1:0 can't be opened" in caplog.text


@pytest.mark.parametrize("port, local_rank", [(-1, 0), (65536, 0), (65535, 1)])
def test_a_port_out_of_range_is_a_configuration_error(port: int, local_rank: int) -> None:
    with pytest.raises(ConfigError, match=rf"port is {port} and the local rank {local_rank}: expected a sum in 1"):
        TrainingMetrics(local_rank=local_rank).start(port)


def test_serving_twice_is_an_error() -> None:
    with TrainingMetrics() as metrics:
        metrics.start(0)
        with pytest.raises(ConfigError, match="served already"):
            metrics.start(0)
