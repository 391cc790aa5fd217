from __future__ import annotations

import io
import logging
import re
import tarfile
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from partial_fc.data import faults
from partial_fc.data.archives import open_archive
from partial_fc.data.augment import Augmentation
from partial_fc.data.dali import dali_available, open_stream
from partial_fc.data.decode import decode_image
from partial_fc.data.faults import GoodSamples, Rows
from partial_fc.data.files import MachineError
from partial_fc.data.order import BalancedOrder, ClassIndex, IdentityOrder, Order, SampleOrder, WeightedOrder
from partial_fc.data.sources import Sources
from partial_fc.data.stream import Batch, PythonStream, SampleStream
from partial_fc.errors import ConfigError, DataError
from tests import records

SIDE = 32
GOOD = records.encode(records.smooth_image(0, SIDE, SIDE), quality=90)
EVERYTHING = Augmentation(
    flip=0.5, rotate=0.2, scale=0.1, shift=0.1, fill=255, crop=0.5, low_resolution=0.3, blur=0.3, jpeg=0.3,
    colour_twist=0.5, grayscale=0.2, cutout=0.3,
)  # fmt: skip
DECODERS = ["python"] + (["dali"] if dali_available() else [])


def level(sample: int) -> int:
    """Grey level of a sample's image."""
    return 10 * sample % 250


def images(count: int = 24, bad: dict[int, bytes] | None = None) -> list[bytes]:
    encoded = [records.encode(np.full((SIDE, SIDE, 3), level(i), dtype=np.uint8)) for i in range(count)]
    for sample, data in (bad or {}).items():
        encoded[sample] = data
    return encoded


def data_set(folder: Path, count: int = 24, bad: dict[int, bytes] | None = None) -> Sources:
    """Images of one grey level each, and the label 100 + id; some replaced by other bytes."""
    records.write_new(folder, images(count, bad), [100 + i for i in range(count)], classes=200)
    return Sources([open_archive(folder)])


def stream(sources: Sources, rank: int = 0, world_size: int = 1, kind: str = "python", **changes) -> SampleStream:
    options = dict(batch_size=8, image_size=SIDE, augmentation=Augmentation(), seed=0, min_samples=10**6)
    order = changes.pop("order", None) or SampleOrder(len(sources), seed=1)
    return open_stream(kind, sources, order, rank=rank, world_size=world_size, **(options | changes))


def global_batches(sources: Sources, world_size: int, steps: int, **changes) -> list[Batch]:
    streams = [stream(sources, rank, world_size, **changes) for rank in range(world_size)]
    batches = []
    for _ in range(steps):
        parts = [part.next_batch() for part in streams]
        fields = ("images", "labels", "sample_ids", "positions")
        batches.append(Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in fields)))
    for part in streams:
        part.close()
    return batches


def assert_same(mine: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert torch.equal(a.positions, b.positions)


def rows(batches: list[Batch]) -> list[tuple[int, int, int, bytes]]:
    """Position, sample, label and pixels of each row, in order."""
    return [
        (int(position), int(sample), int(label), image.numpy().tobytes())
        for batch in batches
        for position, sample, label, image in zip(
            batch.positions, batch.sample_ids, batch.labels, batch.images, strict=True
        )
    ]


def orders(sources: Sources) -> dict[str, Order]:
    classes = ClassIndex(sources.all_labels() // 5)
    return {
        "shuffled": SampleOrder(len(sources), 1),
        "weighted": WeightedOrder([10, len(sources) - 10], [2, 0.5], 1),
        "balanced": BalancedOrder(classes, 1),
        "identities": IdentityOrder(classes, 1, images=2),
    }


@pytest.mark.parametrize("kind", DECODERS)
def test_two_epochs_are_the_same_at_any_world_size_with_every_sample_once(kind: str, tmp_path: Path) -> None:
    count = 53
    sources = data_set(tmp_path, count)
    steps = -(-2 * count // 8)
    alone = global_batches(sources, 1, steps, kind=kind, augmentation=EVERYTHING)
    assert [batch.positions.tolist() for batch in alone] == [list(range(8 * s, 8 * s + 8)) for s in range(steps)]
    ids = torch.cat([batch.sample_ids for batch in alone])
    for epoch in range(2):
        assert sorted(ids[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
    for world_size in (2, 3):
        assert_same(global_batches(sources, world_size, steps, kind=kind, augmentation=EVERYTHING), alone)


@pytest.mark.parametrize("which", ["shuffled", "weighted", "balanced", "identities"])
@pytest.mark.parametrize("kind", DECODERS)
def test_resuming_goes_on_at_the_next_position(kind: str, which: str, tmp_path: Path) -> None:
    """Stopped after any step, and resumed with another world size and another batch size."""
    sources = data_set(tmp_path, 53, bad={7: b"no image, really", 30: b""})
    options = dict(kind=kind, augmentation=EVERYTHING, order=orders(sources)[which])
    whole = rows(global_batches(sources, 1, steps=14, **options))
    for stopped in range(1, 14) if kind == "python" else (1, 2, 5, 7, 13):
        position, world_size, batch_size = 8 * stopped, 1 + stopped % 3, (8, 12, 5, 7)[stopped % 4]
        steps = (len(whole) - position) // batch_size
        resumed = global_batches(sources, world_size, steps, position=position, batch_size=batch_size, **options)
        assert rows(resumed) == whole[position : position + steps * batch_size]


@pytest.mark.parametrize("kind", DECODERS)
def test_batches_that_are_ready_are_told(tmp_path: Path, kind: str) -> None:
    with stream(data_set(tmp_path), kind=kind, prefetch=3, readers=3) as opened:
        assert opened.ready == 0 and opened.room == 3
        opened.next_batch()
        deadline = time.monotonic() + 30
        while opened.ready < opened.room and time.monotonic() < deadline:
            time.sleep(0.01)
        assert opened.ready == opened.room
        if kind == "python":
            held = threading.Event()
            opened._decode = lambda *arguments: held.wait(30)  # type: ignore[attr-defined]
            for _ in range(3):
                opened.next_batch()
            # What is under way isn't ready.
            assert opened.ready == 0
            held.set()
    assert opened.ready == 0


def test_threads_readers_and_prefetch_change_nothing(tmp_path: Path) -> None:
    sources = data_set(tmp_path, bad={5: b"no image, really", 6: b"", 11: GOOD[:-40]})
    for kind in DECODERS:
        expected = global_batches(sources, 1, steps=5, augmentation=EVERYTHING, kind=kind)
        options = dict(augmentation=EVERYTHING, kind=kind)
        assert_same(global_batches(sources, 1, 5, threads=3, prefetch=1, readers=3, **options), expected)
        assert_same(global_batches(sources, 2, 3, position=16, threads=1, readers=1, **options), expected[2:])


def test_memory_is_used_again_once_nobody_has_its_batch(tmp_path: Path) -> None:
    sources = data_set(tmp_path)
    with stream(sources) as mine, stream(sources) as theirs:
        assert len({mine.next_batch().images.data_ptr() for _ in range(30)}) <= 6
        mine.seek(0)
        held = [mine.next_batch().images for _ in range(6)]
        layer = torch.nn.Conv2d(3, 2, 3)
        # Autograd keeps the images, though their tensor is gone here.
        loss = layer(mine.next_batch().images).square().sum()
        for _ in range(20):
            mine.next_batch()
        for images in held:
            assert torch.equal(images, theirs.next_batch().images)
        (gradient,) = torch.autograd.grad(loss, layer.weight)
        loss = layer(theirs.next_batch().images).square().sum()
        assert torch.equal(gradient, torch.autograd.grad(loss, layer.weight)[0])


def test_a_batch_is_what_it_says(tmp_path: Path) -> None:
    with stream(data_set(tmp_path)) as mine:
        for step in range(7):
            assert mine.position == 8 * step
            batch = mine.next_batch()
            ids = SampleOrder(24, seed=1).sample_ids(batch.positions.numpy())
            assert batch.positions.tolist() == list(range(8 * step, 8 * step + 8))
            assert batch.sample_ids.tolist() == ids.tolist()
            assert batch.labels.tolist() == (100 + ids).tolist()
            levels = batch.images.mean(dim=(1, 2, 3)) * 127.5 + 127.5
            assert np.allclose(levels.numpy(), level(ids), atol=2)
        mine.seek(8)
        assert mine.next_batch().positions.tolist() == list(range(8, 16))
        assert not mine.decode_errors


def test_flips_are_those_of_the_positions(tmp_path: Path) -> None:
    image = records.smooth_image(7, SIDE, SIDE)
    sources = Sources([open_archive(records.write_new(tmp_path, [records.encode(image, "PNG")] * 4, [0] * 4))])
    batch = stream(sources, augmentation=Augmentation(flip=0.5), seed=9).next_batch()
    plain = torch.from_numpy(image.transpose(2, 0, 1).copy()).float().sub(127.5).div(127.5)
    flips = Augmentation(flip=0.5).parameters(9, np.arange(8))[:, 0]
    assert 0 < flips.sum() < 8
    for row, flip in zip(batch.images, flips, strict=True):
        assert torch.equal(row, plain.flip(2) if flip else plain)


def write_folder(folder: Path, encoded: list[bytes]) -> Path:
    for sample, data in enumerate(encoded):
        place = folder / f"class{sample // 4:02d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{sample:03d}.jpg").write_bytes(data)
    return folder


def write_tars(folder: Path, encoded: list[bytes]) -> Path:
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as tar:
            for sample in range(shard * len(encoded) // 3, (shard + 1) * len(encoded) // 3):
                for suffix, data in (("jpg", encoded[sample]), ("cls", str(sample // 4).encode())):
                    member = tarfile.TarInfo(f"{sample:03d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def test_the_batches_do_not_depend_on_the_format(tmp_path: Path) -> None:
    encoded = images(bad={5: b"no image, really", 9: b""})
    paths = [
        records.write_new(tmp_path / "rec", encoded, [i // 4 for i in range(24)]),
        write_folder(tmp_path / "folder", encoded),
        write_tars(tmp_path / "tars", encoded),
    ]
    for kind in DECODERS:
        expected, *others = [
            global_batches(Sources([open_archive(path)]), 2, steps=6, kind=kind, augmentation=EVERYTHING)
            for path in paths
        ]
        for other in others:
            assert_same(other, expected)


def test_several_sources_come_as_one(tmp_path: Path) -> None:
    first = open_archive(write_folder(tmp_path / "folder", images(12)))
    second = open_archive(write_tars(tmp_path / "tars", images(24)))
    sources = Sources([first, second])
    order = WeightedOrder(sources.sizes, [2, 1], seed=3)
    batches = global_batches(sources, 2, steps=6, order=order)
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert np.bincount(ids).tolist() == [2] * 12 + [1] * 24
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.tolist() == [sample // 4 if sample < 12 else 3 + (sample - 12) // 4 for sample in ids.tolist()]
    levels = torch.cat([batch.images.mean(dim=(1, 2, 3)) for batch in batches]) * 127.5 + 127.5
    expected = [level(sample if sample < 12 else sample - 12) for sample in ids.tolist()]
    assert np.allclose(levels.numpy(), expected, atol=2)


def next_good(order: Order, position: int, bad: set[int]) -> int:
    """The first good sample at or behind a position: the definition, one position at a time."""
    while (sample := int(order.sample_ids(np.array([position]))[0])) in bad:
        position += 1
    return sample


@pytest.mark.parametrize("kind", DECODERS)
def test_bad_samples_are_replaced_counted_and_named_once(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = records.encode(np.zeros((80, 90, 3), dtype=np.uint8))
    bad = {5: b"no image, really", 6: GOOD[:-40], 20: large, 21: b"", 23: b"neither is this"}
    data_set(tmp_path, bad=bad)
    data = bytearray((tmp_path / "train.rec").read_bytes())
    offsets = [int(line.split()[1]) for line in (tmp_path / "train.idx").read_text().splitlines()]
    data[offsets[12]] ^= 255
    data[offsets[15] + 12 : offsets[15] + 16] = np.float32(-2).tobytes()
    (tmp_path / "train.rec").write_bytes(data)
    sources = Sources([open_archive(tmp_path)])
    kinds = {5: "image", 6: "image", 20: "oversized", 21: "empty", 23: "image", 12: "record", 15: "label"}
    with caplog.at_level(logging.WARNING, "partial_fc.data"):
        with stream(sources, kind=kind, max_image_pixels=7000) as mine:
            batches = [mine.next_batch() for _ in range(6)]
    order = SampleOrder(24, seed=1)
    expected = [next_good(order, position, set(kinds)) for position in range(48)]
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == expected
    assert torch.cat([batch.labels for batch in batches]).tolist() == [100 + sample for sample in expected]
    levels = torch.cat([batch.images.mean(dim=(1, 2, 3)) for batch in batches]) * 127.5 + 127.5
    assert np.allclose(levels.numpy(), level(np.array(expected)), atol=2)
    # Two epochs.
    assert mine.decode_errors == {"image": 6, "record": 2, "label": 2, "empty": 2, "oversized": 2}
    messages = [record.getMessage() for record in caplog.records if "can't be used" in record.getMessage()]
    assert len(messages) == 7
    for sample, reason in kinds.items():
        (named,) = [message for message in messages if f"sample {sample} can't be used ({reason})" in message]
        # Where its record begins, or where in it the image does.
        places = {int(place) for place in re.findall(r"train.rec(?:, |: )byte (\d+)", named)}
        assert places & {offsets[sample], offsets[sample] + 32} and "takes its place" in named
    assert any("90 x 80 pixels, at most 7000 are decoded" in message for message in messages)


@pytest.mark.parametrize("kind", DECODERS)
def test_replacements_do_not_depend_on_the_world_size(kind: str, tmp_path: Path) -> None:
    bad = {sample: GOOD[:-40] if sample % 2 else b"no image, really" for sample in (2, 3, 9, 10, 11, 12, 20, 23)}
    sources = data_set(tmp_path, bad=bad)
    expected = global_batches(sources, 1, steps=7, kind=kind, augmentation=EVERYTHING)
    for world_size in (2, 3, 5):
        assert_same(global_batches(sources, world_size, steps=7, kind=kind, augmentation=EVERYTHING), expected)


def test_too_many_bad_samples_end_the_run(tmp_path: Path) -> None:
    # One in 24 is 4.2 %.
    sources = data_set(tmp_path, bad={3: b"no image, really"})
    mine = stream(sources, max_bad_share=0.01, min_samples=40)
    with pytest.raises(DataError, match=r"train.rec: (\d+) of (\d+) samples.*'image': \1.*at most 0.01.*max_bad_share"):
        for _ in range(40):
            mine.next_batch()
    assert mine.position >= 40, "before so many samples the share means nothing"
    tolerant = stream(sources, max_bad_share=0.06, min_samples=40)
    for _ in range(40):
        tolerant.next_batch()


def counting(share: float) -> GoodSamples:
    sources = MagicMock(path="train.rec", archives=[])
    sources.__len__.return_value = 10
    limits = dict(max_image_pixels=1, max_bad_share=share, min_samples=1000)
    return GoodSamples(sources, SampleOrder(10, 0), SIDE, **limits)  # type: ignore[arg-type]


def test_a_share_of_bad_samples_below_the_limit_stops_no_rank_by_chance() -> None:
    """128,000 samples on each of 32 ranks; seven tenths of what is put up with are bad."""
    generator = np.random.default_rng(0)
    for _ in range(32):
        samples = counting(share=0.01)
        samples._known[0] = "image", "no image"
        samples._named.add(0)
        for _ in range(1000):
            rows = Rows(*(np.zeros(128, dtype=np.int64) for _ in range(3)), [])
            rows.bad = dict.fromkeys(np.flatnonzero(generator.random(128) < 0.007).tolist(), 0)
            samples.count(rows)
    samples = counting(share=0.01)
    samples._known[0] = "image", "no image"
    with pytest.raises(DataError, match="at most 0.01"):
        for _ in range(100):
            rows = Rows(*(np.zeros(128, dtype=np.int64) for _ in range(3)), [])
            rows.bad = dict.fromkeys(np.flatnonzero(generator.random(128) < 0.02).tolist(), 0)
            samples.count(rows)


@pytest.mark.parametrize("kind", DECODERS)
def test_after_an_exception_the_same_batch_comes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = data_set(tmp_path)
    mine = stream(sources, kind=kind)
    read, failures = mine._samples.read, iter([True])

    def fail_once(positions: np.ndarray, ids: np.ndarray) -> Rows:
        if 24 in positions and next(failures, False):
            raise DataError("the cable was loose")
        return read(positions, ids)

    monkeypatch.setattr(mine._samples, "read", fail_once)
    batches: list[Batch] = []
    with pytest.raises(DataError, match="the cable was loose"):
        while True:
            batches.append(mine.next_batch())
    assert mine.position == 8 * len(batches)
    while len(batches) < 8:
        batches.append(mine.next_batch())
    mine.close()
    assert_same(batches, global_batches(sources, 1, steps=8, kind=kind))


@pytest.mark.parametrize("kind", DECODERS)
def test_a_failed_count_leaves_the_position(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = stream(data_set(tmp_path), kind=kind)
    first = mine.next_batch()

    def refuse(rows: Rows) -> None:
        raise DataError("too many")

    with monkeypatch.context() as patched:
        patched.setattr(mine._samples, "count", refuse)
        for _ in range(2):
            with pytest.raises(DataError, match="too many"):
                mine.next_batch()
            assert mine.position == 8
    second = mine.next_batch()
    assert second.positions.tolist() == list(range(8, 16)) and first.positions.tolist() == list(range(8))
    mine.close()


def test_batches_are_decoded_ahead_and_bad_ones_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def decode(encoded: np.ndarray, image_size: int, **options: int) -> np.ndarray:
        decoded.append(encoded.size)
        return decode_image(encoded, image_size, **options)

    monkeypatch.setattr(faults, "decode_image", decode)
    # Its header is in order but for the Huffman table; and a comment gives it a length of its own.
    tables = GOOD.index(b"\xff\xc4")
    bad = GOOD[: tables + 5] + b"\xff" * 16 + GOOD[tables + 21 :] + bytes(77)
    mine = stream(data_set(tmp_path, bad={3: bad}), prefetch=3, threads=1)
    mine.next_batch()
    assert len(mine._ahead) == 3  # type: ignore[attr-defined]
    for _ in range(20):
        mine.next_batch()
    mine.close()
    # Once as itself, and once more to learn why.
    assert decoded.count(len(bad)) == 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", DECODERS)
def test_a_data_set_without_a_good_sample_is_refused(kind: str, tmp_path: Path) -> None:
    sources = data_set(tmp_path, bad={sample: b"no image, really" for sample in range(24)})
    with pytest.raises(DataError, match="none of the .* samples from position 0 on can be used.*train.rec.*16 bytes"):
        stream(sources, kind=kind).next_batch()


@pytest.mark.timeout(60)
def test_files_that_vanish_while_they_are_read_are_bad_samples(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", images())
    sources = Sources([open_archive(folder)])
    for sample in (3, 17):
        next(folder.glob(f"*/{sample:03d}.jpg")).unlink()
    with stream(sources) as mine:
        batches = [mine.next_batch() for _ in range(3)]
    assert mine.decode_errors == {"record": 2}
    assert not {3, 17} & set(torch.cat([batch.sample_ids for batch in batches]).tolist())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", DECODERS)
def test_an_exception_in_the_background_arrives(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = stream(data_set(tmp_path), kind=kind)
    mine.next_batch()

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(mine._samples, "read", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in range(8):
            mine.next_batch()
    mine.close()


@pytest.mark.parametrize("kind", DECODERS)
def test_what_is_the_fault_of_the_machine_counts_for_no_sample(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = data_set(tmp_path)
    with stream(sources, kind=kind) as mine:
        mine.next_batch()

        def full(ids: np.ndarray) -> list[np.ndarray]:
            raise MachineError("train.rec: too many open files: raise the limit (ulimit -n)")

        monkeypatch.setattr(sources, "encoded", full)
        with pytest.raises(MachineError, match="too many open files"):
            for _ in range(9):
                mine.next_batch()
        assert not mine.decode_errors and not mine._samples._known


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    sources = data_set(tmp_path)
    with pytest.raises(ConfigError, match="batch of 8 can't be split over 9 ranks"):
        stream(sources, world_size=9)
    with pytest.raises(ConfigError, match="got -8"):
        stream(sources, position=-8)
    with pytest.raises(ConfigError, match="must be 1 or more, got 0"):
        stream(sources, threads=0)
    with pytest.raises(ConfigError, match="must be 1 or more, got 2, 0"):
        stream(sources, readers=0)
    with pytest.raises(ConfigError, match="order is of 23 samples, the data set has 24"):
        options = dict(batch_size=8, rank=0, world_size=1, image_size=SIDE, augmentation=Augmentation(), seed=0)
        PythonStream(sources, SampleOrder(23, 0), **options)
