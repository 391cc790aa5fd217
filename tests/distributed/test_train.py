"""The command line as a user runs it: torchrun, a saved model, its evaluation; one line for each kind of bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml

from partial_fc.data.order import SampleOrder
from partial_fc.data.synthetic import make_dataset

DEADLINE = 180
CLASSES = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    make_dataset(
        folder, identities=CLASSES, images_per_identity=4, validation_identities=20, pairs=60, image_size=32, workers=1
    )
    return folder


def write_config(folder: Path, data: Path) -> Path:
    content = {
        "data": {"path": str(data), "image_size": 32, "threads": 1},
        "backbone": {"name": "small", "embedding_size": 16, "width": 8},
        "head": {"scale": 16.0, "sample_rate": 0.5, "negatives": {"name": "SupportVectors", "t": 1.1}},
        "optim": {"learning_rate": 0.1},
        "train": {"batch_size": 10, "steps": 4, "log_every": 2, "device": "cpu", "run_dir": str(folder / "runs")},
        "metrics": {"enabled": False},
        "evaluate": {"sets": ["demo_val.bin"], "every_steps": 2},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def run(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m"]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
        launcher += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m"]
    command = [sys.executable, *launcher, "partial_fc", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE, env=environment, check=False, errors="replace"
    )


def lines_of(run_folder: Path, kind: str) -> list[dict[str, object]]:
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def test_two_ranks_train_save_and_evaluate(tmp_path: Path, data: Path) -> None:
    config = write_config(tmp_path, data)
    done = run("train", str(config), ranks=2)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "tiny"
    assert f"run folder    {folder}" in done.stdout
    trained = lines_of(folder, "train")
    assert [line["step"] for line in trained] == [2, 4] and trained[-1]["samples"] == 40
    in_training = lines_of(folder, "evaluation")
    assert [line["step"] for line in in_training] == [2, 4]

    alone = run("evaluate", str(folder))
    assert alone.returncode == 0, alone.stderr
    assert f"demo_val: accuracy {in_training[-1]['accuracy']:.4f}" in alone.stdout, "the saved model is another one"
    assert (folder / "report.md").is_file() and (folder / "report.png").stat().st_size > 10_000
    again = run("train", str(config), "train.steps=1", "evaluate.sets=[]")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "runs" / "tiny-2" / "model" / ".metadata").is_file()


def test_accumulation_adamw_clipping_and_dropout_in_two_phases(tmp_path: Path, data: Path) -> None:
    options = ["train.accumulate=2", "optim.name=adamw", "optim.learning_rate=1e-3", "optim.clip_norm=1.0"]
    options += ["optim.head_clip_norm=1.0", "backbone.dropout=0.1", "optim.schedule=cosine", "optim.warmup_steps=1"]
    done = run("train", str(write_config(tmp_path, data)), *options, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "in two phases: train.accumulate=2" in done.stdout
    assert len(lines_of(tmp_path / "runs" / "tiny", "train")) == 2


def test_metrics_are_served_by_every_rank_while_training(tmp_path: Path, data: Path) -> None:
    config = write_config(tmp_path, data)
    code = f"""
import urllib.request
from partial_fc.config import load_config
from partial_fc.ranks import joined_ranks
from partial_fc.train import Trainer
settings = load_config({str(config)!r}, ["metrics.enabled=true", "evaluate.sets=[]"])
with joined_ranks(settings) as place:
    trainer = Trainer(settings, place)
    from partial_fc import train
    class Probe(train.TrainingMetrics):
        def start(self, port, address="127.0.0.1", **options):
            self.probe = super().start(0, address, **options)
            return self.probe
        def close(self):
            if self.url:
                print(urllib.request.urlopen(self.url).read().decode())
            super().close()
    train.TrainingMetrics = Probe
    trainer.fit()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    assert "partial_fc_steps_total 4.0" in done.stdout and "partial_fc_samples_total 40.0" in done.stdout
    for phase in ("data", "backbone_forward", "head_forward", "head_backward", "backbone_backward", "optimizer"):
        assert f'partial_fc_step_seconds_count{{phase="{phase}"}} 4.0' in done.stdout
    assert 'partial_fc_learning_rate{group="head"}' in done.stdout
    assert "partial_fc_support_vectors_per_sample nan" not in done.stdout.lower()


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One error line with these parts, a failure, and no long trace (torchrun adds its own summary)."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0
    assert len(errors) == 1, done.stderr
    for part in parts:
        assert part in errors[0]
    assert "partial_fc/" not in done.stderr.replace(errors[0], ""), "a trace through the package"
    assert len(done.stderr.splitlines()) < 60, done.stderr


def test_a_label_out_of_range_stops_all_ranks(tmp_path: Path, data: Path) -> None:
    done = run("train", str(write_config(tmp_path, data)), f"data.num_classes={CLASSES // 2}", ranks=2)
    assert_one_line(done, f"data.num_classes: got {CLASSES // 2}", "has the label", f"expected at least {CLASSES}")


def run_script(folder: Path, config: Path, change: str, ranks: int) -> subprocess.CompletedProcess[str]:
    """Train with something changed in a rank: ``change`` is code that sees ``trainer`` and ``place``."""
    script = folder / "job.py"
    script.write_text(f"""
from partial_fc.cli_errors import one_line_errors
from partial_fc.config import load_config
from partial_fc.errors import DataError
from partial_fc.ranks import joined_ranks
from partial_fc.train import Trainer
with one_line_errors():
    settings = load_config({str(config)!r}, ["evaluate.sets=[]", "train.steps=1000", "train.timeout_seconds=200"])
    with joined_ranks(settings) as place:
        trainer = Trainer(settings, place)
        genuine = trainer.stream.next_batch
{textwrap.indent(textwrap.dedent(change), "        ")}
        trainer.fit()
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_a_head_that_meets_a_label_out_of_range_stops_all_ranks(tmp_path: Path, data: Path) -> None:
    change = f"""
        def wrong():
            batch = genuine()
            if place.rank == 1 and trainer.stream.position > 30:
                batch.labels[0] = {CLASSES}
            return batch
        trainer.stream.next_batch = wrong
    """
    done = run_script(tmp_path, write_config(tmp_path, data), change, ranks=2)
    assert_one_line(done, "label", f"outside [0, {CLASSES})", "rank 1")


def test_data_that_fail_on_one_rank_stop_all_ranks_at_that_step(tmp_path: Path, data: Path) -> None:
    """The others don't wait for the group's timeout, nor find out by a lost connection."""
    change = """
        def failing():
            if place.rank == 1 and trainer.stream.position > 30:
                raise DataError("train.rec: the disk is gone")
            return genuine()
        trainer.stream.next_batch = failing
        raised = trainer.training_step._raise_data_failure
        def say():
            print("stops at", trainer.stream.position, flush=True)
            raised()
        trainer.training_step._raise_data_failure = say
    """
    done = run_script(tmp_path, write_config(tmp_path, data), change, ranks=2)
    assert_one_line(done, "rank 1: train.rec: the disk is gone")
    assert done.stdout.count("stops at") == 2
    assert "another rank is gone" not in done.stderr


def test_an_embedding_that_is_not_finite_stops_all_ranks(tmp_path: Path, data: Path) -> None:
    options = ["optim.learning_rate=1e38", "train.steps=10"]
    done = run("train", str(write_config(tmp_path, data)), *options, ranks=2)
    assert_one_line(done, "isn't finite", "rank")


def test_steps_that_are_not_finite_are_skipped_on_request(tmp_path: Path, data: Path) -> None:
    options = ["optim.learning_rate=1e38", "train.nonfinite=skip", "evaluate.sets=[]"]
    done = run("train", str(write_config(tmp_path, data)), *options, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "is skipped" in done.stderr


def test_an_unknown_key_names_the_nearest(tmp_path: Path, data: Path) -> None:
    done = run("train", str(write_config(tmp_path, data)), "head.sampel_rate=0.1")
    assert_one_line(done, "head.sampel_rate", "sample_rate")


def test_a_missing_index(tmp_path: Path, data: Path) -> None:
    shutil.copytree(data, tmp_path / "copy")
    (tmp_path / "copy" / "train.idx").unlink()
    done = run("train", str(write_config(tmp_path, tmp_path / "copy")), ranks=2)
    assert_one_line(done, "train.idx")


def test_a_truncated_record_file(tmp_path: Path, data: Path) -> None:
    shutil.copytree(data, tmp_path / "copy")
    record = tmp_path / "copy" / "train.rec"
    with record.open("r+b") as file:
        file.truncate(record.stat().st_size // 2)
    done = run("train", str(write_config(tmp_path, tmp_path / "copy")), ranks=2)
    assert_one_line(done, "train.rec")


def test_a_corrupt_image_is_replaced_and_counted(tmp_path: Path, data: Path) -> None:
    shutil.copytree(data, tmp_path / "copy")
    record = tmp_path / "copy" / "train.rec"
    content = bytearray(record.read_bytes())
    first = content.index(b"\xff\xd8\xff")
    content[first : first + 3] = b"xxx"
    record.write_bytes(content)
    # 96 images, 120 samples: the bad one comes up once at least.
    options = ["train.steps=12", "evaluate.sets=[]"]
    done = run("train", str(write_config(tmp_path, tmp_path / "copy")), *options, ranks=2)
    assert done.returncode == 0, done.stderr
    order = SampleOrder(4 * CLASSES, seed=0).sample_ids(np.arange(200))
    first = int(np.argmax(order == 0))
    assert f"sample 0 can't be used (image), sample {order[first + 1]} takes its place" in done.stderr


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    assert_one_line(run("evaluate", str(tmp_path)), "no run is there")
