"""The data benchmark's contenders do the same work, its clocks count all of it, and its command runs."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import data_rounds
from benchmarks.data_contenders import (
    CONTENDERS,
    Images,
    RecordDataset,
    Work,
    decode_opencv,
    decode_pillow,
    write_image_index,
)
from benchmarks.data_rounds import (
    ContenderFailed,
    ContenderProcess,
    Facts,
    Round,
    cpu_seconds,
    differences,
    efficiency_ratio,
    run_round,
    take_turns,
)
from partial_fc.data import dali_available, decode_images, open_archive
from tests import records

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data.py"
SIDE, CLASSES = 32, 4
# Burns the CPU time it's asked for, says so, and waits for its input to end.
BURN = "import sys, time\nwhile time.process_time() < {}: pass\nprint(flush=True)\nsys.stdin.read()"


def jpegs(count: int) -> list[bytes]:
    return [records.encode(records.smooth_image(seed, SIDE, SIDE), quality=95) for seed in range(count)]


def old_set(folder: Path, count: int) -> Path:
    return records.write_old(folder, jpegs(count), [CLASSES * row // count for row in range(count)], CLASSES)


def batch(value: float, labels: list[int], ids: list[int] | None = None) -> Images:
    images = torch.full((len(labels), 3, 2, 2), value) + 0.1 * torch.arange(2)
    return Images(images, torch.tensor(labels), None if ids is None else torch.tensor(ids))


def facts(*batches: Images, most: int = 100) -> Facts:
    found = Facts()
    for one in batches:
        found.add(one, most)
    return found


@pytest.mark.parametrize("write", [records.write_old, records.write_new])
def test_the_index_has_the_lines_of_images_only(tmp_path: Path, write: object) -> None:
    images = jpegs(6)
    assert callable(write)
    write(tmp_path / "set", images, [0, 0, 1, 1, 1, 2], 3)
    assert write_image_index(tmp_path / "set" / "train.rec", tmp_path / "images.idx") == 6
    lines = np.loadtxt(tmp_path / "images.idx", dtype=np.int64)
    assert lines[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    data = (tmp_path / "set" / "train.rec").read_bytes()
    ends = [*lines[1:, 1].tolist(), len(data)]
    assert all(image in data[at:end] for image, at, end in zip(images, lines[:, 1].tolist(), ends, strict=True))


@pytest.mark.parametrize("decode", [decode_opencv, decode_pillow])
def test_the_loader_gives_the_images_and_labels_that_our_reader_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode: object
) -> None:
    record = old_set(tmp_path / "set", 8) / "train.rec"
    write_image_index(record, tmp_path / "images.idx")
    assert callable(decode)
    dataset = RecordDataset(str(record), str(tmp_path / "images.idx"), decode)
    archive, everything = open_archive(record), np.arange(8)
    expected = decode_images(archive.encoded(everything), SIDE)
    for draw, flipped in ((0.9, expected), (0.1, expected.flip(3))):
        monkeypatch.setattr(random, "random", lambda draw=draw: draw)
        rows = [dataset[row] for row in range(len(dataset))]
        torch.testing.assert_close(torch.stack([image for image, _ in rows]), flipped, rtol=0, atol=0.02)
        assert [label for _, label in rows] == archive.labels(everything).tolist()


def test_the_loader_refuses_a_record_in_parts(tmp_path: Path) -> None:
    aligned = b"\xff\xd8" + bytes(2) + records.MAGIC.to_bytes(4, "little") + bytes(4)
    record = records.write_old(tmp_path, [aligned], [0]) / "train.rec"
    write_image_index(record, tmp_path / "images.idx")
    dataset = RecordDataset(str(record), str(tmp_path / "images.idx"), decode_opencv)
    with pytest.raises(ValueError, match="byte 0: a record in parts"):
        dataset[0]


def test_an_epoch_in_another_order_and_flipped_is_the_same_work() -> None:
    first = facts(batch(0.1, [0, 2], [0, 1]), batch(0.5, [1], [2]))
    second = facts(batch(0.5, [1]), Images(batch(0.1, [2, 0]).images.flip(3), torch.tensor([2, 0]), None))
    assert first.images == 3 and first.shape == (3, 2, 2) and first.dtype == "float32"
    assert first.counts.tolist() == [1, 1, 1]
    assert differences({"a": first, "b": second}, whole=True) == []


def test_of_the_last_batch_only_the_rows_of_the_epoch_count() -> None:
    cut = facts(batch(0.1, [0, 1, 1, 1], [0, 1, 1, 1]), most=2)
    assert cut.images == 2 and cut.counts.tolist() == [1, 1] and cut.id_sum == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (facts(batch(0.1, [0, 1, 1])), "b: images 3, a: 2"),
        (facts(batch(0.1, [0, 0])), "b: 2 images of class 0, a: 1"),
        (facts(batch(0.2, [0, 1])), "b: mean level of class 0 is 0.1 from that of a"),
        (facts(batch(5, [0, 1])), "b: levels from 5 to 5.1, expected -1 to 1"),
        (facts(batch(0.1, [0, 1], [1, 1])), "b: the sample ids of an epoch of 2 sum to 2"),
        (facts(batch(0.1, [0, 1])._replace(images=torch.zeros(2, 3, 2, 3))), r"b: shape (3, 2, 3), a: (3, 2, 2)"),
        (facts(batch(0.1, [0, 1])._replace(images=torch.zeros(2, 3, 2, 2).half())), "b: dtype float16, a: float32"),
    ],
)
def test_other_work_is_found(other: Facts, message: str) -> None:
    found = differences({"a": facts(batch(0.1, [0, 1])), "b": other}, whole=True)
    assert message in found


def test_augmented_images_may_differ_but_not_their_labels() -> None:
    plain, augmented = facts(batch(0.1, [0, 1])), facts(batch(0.4, [0, 1]))
    assert differences({"a": augmented, "b": plain}, whole=True, augmented=["a"]) == []
    assert differences({"a": facts(batch(0.4, [1, 1])), "b": plain}, whole=True, augmented=["a"]) != []


def test_the_cpu_time_counts_children_that_live_and_that_ended() -> None:
    before = cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", BURN.format(0.3)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    living = cpu_seconds()
    assert living - before >= 0.3
    child.communicate()
    assert cpu_seconds() >= living


def test_a_round_times_what_comes_after_the_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def stream():
        for seconds in [100.0] * 3 + [0.5] * 5:
            clock[0] += seconds
            yield batch(0.1, [0, 1])

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    # The tests' own process isn't alone on the machine, and has processes of other tests.
    spent = iter([7.0, 9.0])
    monkeypatch.setattr(data_rounds, "wait_for_standstill", lambda: next(spent))
    batches = stream()
    assert run_round(batches, lead=3, batches=5) == Round(10 / 2.5, 1e6 * 2.0 / 16)
    assert next(batches, None) is None


def test_ratios_are_taken_within_a_round() -> None:
    rounds = {
        "ours": [Round(1, 10), Round(1, 20), Round(1, 90)],
        "other": [Round(1, 20), Round(1, 20), Round(1, 360)],
    }
    assert efficiency_ratio(rounds, "ours", "other") == 2
    assert efficiency_ratio(rounds, "ours", "ours") == 1
    assert efficiency_ratio(rounds, "ours", "absent") is None


def test_contenders_take_turns_and_the_first_round_is_not_counted() -> None:
    calls = []

    class Fake(ContenderProcess):
        def __init__(self, name: str) -> None:
            self.name = name

        def round(self, lead: int, batches: int) -> Round:
            calls.append(self.name)
            return Round(len(calls), lead + batches)

    results = take_turns([Fake("a"), Fake("b"), Fake("c")], 2, 1, 4)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert [one.images_per_second for one in results["a"]] == [6, 8]


@pytest.mark.timeout(60)
def test_a_contender_that_fails_is_named(tmp_path: Path) -> None:
    work = Work(str(tmp_path / "no.rec"), str(tmp_path / "no.idx"))
    with ContenderProcess("ours-python", CONTENDERS["ours-python"].open, work) as process:
        with pytest.raises(ContenderFailed, match="ours-python: its process ended with status 1"):
            process.check(1)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_benchmark_runs(tmp_path: Path) -> None:
    folder, out, chart = old_set(tmp_path / "set", 40), tmp_path / "data.json", tmp_path / "data.png"
    arguments = ["--data", str(folder), "--image-size", str(SIDE), "--batch", "8", "--rounds", "1", "--batches", "3"]
    arguments += ["--workers", "1", "--passes", "1", "--json", str(out)]
    if importlib.util.find_spec("matplotlib"):
        arguments += ["--chart", str(chart)]
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    expected = {name for name in CONTENDERS if dali_available() or not CONTENDERS[name].dali} - {"loader-pillow"}
    assert set(record["result"]["rounds"]) == expected
    assert all(len(rounds) == 1 for rounds in record["result"]["rounds"].values())
    assert record["result"]["ratios"]["loader-opencv"]["loader-opencv"] == 1
    assert record["environment"]["packages"]["numpy"] == np.__version__
    assert "DataLoader + OpenCV" in done.stdout
    assert chart.exists() or not importlib.util.find_spec("matplotlib")
    shown = subprocess.run([sys.executable, str(SCRIPT), "--load", str(out)], capture_output=True, text=True)
    assert shown.stdout == done.stdout
