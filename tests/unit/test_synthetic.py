"""The drawn data set: the same for any number of workers, well-formed, and safe to interrupt."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from partial_fc.data import synthetic
from partial_fc.data.faces import Painter
from partial_fc.data.synthetic import make_dataset
from partial_fc.errors import ConfigError, DataError
from tests.unit.test_writers import parse

TINY = {"identities": 10, "images_per_identity": 3, "validation_identities": 8, "pairs": 40, "image_size": 32}
FILES = ["demo_val.bin", "property", "train.idx", "train.rec"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("synthetic")
    make_dataset(made, **TINY, workers=1)
    return made


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """New interpreters, as where other threads run, would each take seconds to import the package."""
    if sys.platform != "linux":
        pytest.skip("workers are forked on Linux only")
    monkeypatch.setattr(synthetic, "_context", lambda: multiprocessing.get_context("fork"))


def validation(folder: Path) -> tuple[list[bytes], list[bool]]:
    with open(folder / "demo_val.bin", "rb") as file:
        return pickle.load(file)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def test_train_set(folder: Path) -> None:
    records, _ = parse(folder)
    assert sorted(records) == list(range(1 + 30 + 10))
    for key in range(1, 31):
        _, labels, _, image = records[key]
        assert labels[0] == (key - 1) // 3
        assert cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR).shape == (32, 32, 3)
    assert len({records[key][3] for key in range(1, 31)}) == 30
    assert (folder / "property").read_text() == "10,32,32\n"


def test_validation_set(folder: Path) -> None:
    bins, issame = validation(folder)
    assert issame == ([True] * 2 + [False] * 2) * 10 and len(bins) == 80
    assert all(type(same) is bool for same in issame)
    painter = Painter(32, 0)
    owner = {
        image: identity for identity in range(8) for image in painter.images(synthetic._VALIDATION_START + identity, 3)
    }
    pairs = set()
    for number, same in enumerate(issame):
        first, second = bins[2 * number : 2 * number + 2]
        assert first != second
        assert (owner[first] == owner[second]) == same
        pairs.add(frozenset((first, second)))
    assert len(pairs) == 40
    # An image that is used twice is one object, also in the file.
    assert len({id(image) for image in bins}) == len(set(bins)) < 80
    same_of = [owner[bins[2 * number]] for number in range(40) if issame[number]]
    assert max(map(same_of.count, range(8))) - min(map(same_of.count, range(8))) <= 1


def test_identities_of_the_sets_are_disjoint(folder: Path) -> None:
    records, _ = parse(folder)
    train = {records[key][3] for key in range(1, 31)}
    assert train.isdisjoint(validation(folder)[0])
    assert synthetic._VALIDATION_START > 1 << 32


@pytest.mark.usefixtures("forked")
def test_the_number_of_workers_changes_nothing(folder: Path, tmp_path: Path) -> None:
    threads = cv2.getNumThreads()
    seen = []
    make_dataset(tmp_path, **TINY, workers=3, progress=lambda done, total: seen.append((done, total)))
    assert contents(tmp_path) == contents(folder)
    assert seen == [(8, 18), (16, 18), (18, 18)]
    assert cv2.getNumThreads() == threads


def test_the_seed_changes_everything(folder: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path, **TINY, seed=1, workers=1)
    first, second = parse(tmp_path)[0], parse(folder)[0]
    assert all(first[key][3] != second[key][3] for key in range(1, 31))


def test_an_image_depends_on_seed_identity_and_number_only() -> None:
    assert Painter(32, 5).images(7, 2) == Painter(32, 5).images(7, 6)[:2]
    assert Painter(32, 5).images(7, 2) != Painter(32, 5).images(8, 2)


def test_images_are_varied() -> None:
    painter = Painter(64, 0)
    images = [cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR) for image in painter.images(3, 20)]
    spread = np.stack(images).astype(float).std(axis=0).mean()
    assert spread > 30
    assert all(image.std() > 15 for image in images)


def test_workers_are_forked_only_where_no_other_thread_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.active_count", lambda: 2)
    assert synthetic._context().get_start_method() == "spawn"
    monkeypatch.setattr("threading.active_count", lambda: 1)
    assert synthetic._context().get_start_method() == ("fork" if sys.platform == "linux" else "spawn")


def test_sizes_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"identities must be at least 1, got 0; .*multiple of 20, got 30"):
        make_dataset(tmp_path, identities=0, pairs=30)
    with pytest.raises(ConfigError, match="pairs must be at most 20 with 4 validation identities of 3 images, got 40"):
        make_dataset(tmp_path, images_per_identity=3, validation_identities=4, pairs=40)
    with pytest.raises(ConfigError, match="workers must be at least 1, got 0"):
        make_dataset(tmp_path, workers=0)
    assert os.listdir(tmp_path) == []


def test_every_possible_pair_can_be_had(tmp_path: Path) -> None:
    make_dataset(tmp_path, identities=1, images_per_identity=5, validation_identities=3, pairs=60, image_size=16,
                 workers=1)  # fmt: skip
    bins, _ = validation(tmp_path)
    assert len({frozenset(bins[i : i + 2]) for i in range(0, 120, 2)}) == 60


@pytest.mark.usefixtures("forked")
def test_a_worker_that_dies_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Painter, "images", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="a process that draws images died .*: try again with workers=1"):
        make_dataset(tmp_path, **TINY, workers=2)
    assert os.listdir(tmp_path) == []


def test_interrupted_making_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path, **TINY, workers=1, progress=stop)
    assert os.listdir(tmp_path) == []
