from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from partial_fc.data import decode
from partial_fc.data.augment import Augmentation
from partial_fc.data.decode import decode_image, decode_images, warp_image
from partial_fc.data.order import SampleOrder
from partial_fc.data.readers import RecordReader
from partial_fc.data.stream import Batch, PythonStream
from partial_fc.errors import ConfigError, DataError
from tests import records

SIDE = 32
GOOD = records.encode(records.smooth_image(0, SIDE, SIDE), quality=90)


@pytest.fixture(params=["opencv", "pillow"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pillow":
        monkeypatch.setattr(decode, "_opencv", lambda: None)
    return request.param


def data_set(folder: Path, count: int = 24, bad: dict[int, bytes] | None = None) -> RecordReader:
    """Images of one grey level each, 10 * id, and the label 100 + id; some replaced by other bytes."""
    images = [records.encode(np.full((SIDE, SIDE, 3), 10 * i % 250, dtype=np.uint8)) for i in range(count)]
    for sample, data in (bad or {}).items():
        images[sample] = data
    return RecordReader(records.write_new(folder, images, [100 + i for i in range(count)], classes=200))


def stream(reader: RecordReader, rank: int = 0, world_size: int = 1, **changes) -> PythonStream:
    options = dict(batch_size=8, image_size=SIDE, augmentation=Augmentation(), seed=0, min_samples=10**6)
    return PythonStream(
        reader, SampleOrder(len(reader), seed=1), rank=rank, world_size=world_size, **(options | changes)
    )


def global_batches(reader: RecordReader, world_size: int, steps: int, **changes) -> list[Batch]:
    streams = [stream(reader, rank, world_size, **changes) for rank in range(world_size)]
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


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_are_rgb(kind: str, library: str) -> None:
    image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    image[..., 0], image[..., 1] = 200, 50
    result = decode_image(records.encode(image, kind), SIDE)
    assert result.shape == (SIDE, SIDE, 3) and result.dtype == np.uint8
    assert np.abs(result.astype(int) - [200, 50, 0]).max() <= 4


def test_grey_and_turned_images(library: str) -> None:
    image = records.smooth_image(1, SIDE, SIDE)
    grey = decode_image(records.encode(image[..., 0], "PNG"), SIDE)
    assert np.array_equal(grey, np.repeat(image[..., :1], 3, axis=2))
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = decode_image(records.encode(image, quality=95, subsampling=0, exif=exif), SIDE)
    assert np.abs(turned.astype(int) - image[::-1, ::-1]).mean() < 4


def test_images_of_another_size_are_resized_with_a_filter(library: str) -> None:
    stripes = np.zeros((4 * SIDE, 4 * SIDE, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    result = decode_image(records.encode(stripes, "PNG"), SIDE)
    assert result.shape == (SIDE, SIDE, 3)
    assert np.abs(result[:, 2:-2].astype(int) - 127).max() <= 2
    assert decode_image(records.encode(records.smooth_image(2, 20, 50)), SIDE).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are no image"),
        (b"not an image at all", "19 bytes that begin with b'not an i' are no image"),
        (GOOD[: len(GOOD) // 2], "JPEG of .* bytes is truncated"),
        (GOOD[:-2], "JPEG of .* bytes is truncated"),
        (GOOD[:30] + b"\xff\xd9", "are no image"),
        (records.encode(records.smooth_image(0, SIDE, SIDE), "PNG")[:200], "are no image"),
    ],
)
def test_broken_images_are_refused(data: bytes, message: str, library: str) -> None:
    for encoded in (data, np.frombuffer(data, dtype=np.uint8)):
        with pytest.raises(DataError, match=message + ".*copy the data again"):
            decode_image(encoded, SIDE)


def test_decode_images_normalises() -> None:
    images = [records.encode(np.full((SIDE, SIDE, 3), level, dtype=np.uint8), "PNG") for level in (0, 255, 51)]
    result = decode_images(images, SIDE)
    assert result.shape == (3, 3, SIDE, SIDE) and result.dtype == torch.float32 and result.is_contiguous()
    for image, value in zip(result, (-1.0, 1.0, -0.6), strict=True):
        assert torch.allclose(image, torch.tensor(value))
    assert decode_images([], SIDE).shape == (0, 3, SIDE, SIDE)
    with pytest.raises(DataError, match="image 1 of 2: "):
        decode_images([images[0], b"no image, really"], SIDE)


def test_warp_is_bilinear_with_a_fill(library: str) -> None:
    image = records.smooth_image(3, SIDE, SIDE)
    assert np.array_equal(warp_image(image, np.eye(2, 3, dtype=np.float32), 0), image)
    # The output's pixel (x, y) shows the source's (x + 2.5, y - 3).
    moved = warp_image(image, np.array([[1, 0, 2.5], [0, 1, -3]], dtype=np.float32), 77).astype(float)
    expected = (image[:-3, 2:-1].astype(float) + image[:-3, 3:]) / 2
    assert np.abs(moved[3:, :-3] - expected).max() <= 0.6
    assert (moved[:3] == 77).all() and (moved[:, -2:] == 77).all()
    # Half of the last column's neighbour is outside: blended with the fill.
    assert np.abs(moved[3:, -3] - (image[:-3, -1].astype(float) + 77) / 2).max() <= 0.6


def test_both_libraries_warp_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    image = records.smooth_image(4, SIDE, SIDE)
    matrix = np.array([[0.9, 0.2, 3.3], [-0.25, 1.1, 2.7]], dtype=np.float32)
    mine = warp_image(image, matrix, 200).astype(int)
    monkeypatch.setattr(decode, "_opencv", lambda: None)
    # OpenCV before 5 rounds coordinates to 1/32 pixel.
    assert np.abs(mine - warp_image(image, matrix, 200)).max() <= 3


def test_batches_are_the_same_at_any_world_size_and_number_of_threads(tmp_path: Path) -> None:
    reader = data_set(tmp_path, bad={5: b"no image, really", 6: b"", 11: GOOD[:-40]})
    augmentation = Augmentation(flip=0.5, rotate=0.2, scale=0.1, shift=0.1, fill=255)
    expected = global_batches(reader, 1, steps=5, augmentation=augmentation)
    for world_size in (2, 3):
        assert_same(global_batches(reader, world_size, steps=5, augmentation=augmentation), expected)
    assert_same(global_batches(reader, 1, 5, augmentation=augmentation, threads=3, prefetch=1), expected)
    assert_same(global_batches(reader, 2, 3, augmentation=augmentation, position=16), expected[2:])


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
            assert np.allclose(levels.numpy(), 10 * ids % 250, atol=2)
        mine.seek(8)
        assert mine.next_batch().positions.tolist() == list(range(8, 16))
        assert not mine.decode_errors


def test_flips_are_those_of_the_positions(tmp_path: Path) -> None:
    image = records.smooth_image(7, SIDE, SIDE)
    reader = RecordReader(records.write_new(tmp_path, [records.encode(image, "PNG")] * 4, [0] * 4))
    batch = stream(reader, augmentation=Augmentation(flip=0.5), seed=9).next_batch()
    plain = torch.from_numpy(image.transpose(2, 0, 1).copy()).float().sub(127.5).div(127.5)
    flips = Augmentation(flip=0.5).parameters(9, np.arange(8))[:, 0]
    assert 0 < flips.sum() < 8
    for row, flip in zip(batch.images, flips, strict=True):
        assert torch.allclose(row, plain.flip(2) if flip else plain)


def test_bad_samples_are_replaced_counted_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = {5: b"no image, really", 6: GOOD[:-40], 23: b"neither is this"}
    reader = data_set(tmp_path, bad=bad)
    data = bytearray((tmp_path / "train.rec").read_bytes())
    offsets = [int(line.split()[1]) for line in (tmp_path / "train.idx").read_text().splitlines()]
    data[offsets[12]] ^= 255
    data[offsets[15] + 12 : offsets[15] + 16] = np.float32(-2).tobytes()
    (tmp_path / "train.rec").write_bytes(data)
    reader = RecordReader(tmp_path)
    stands_in = {5: 7, 6: 7, 23: 0, 12: 13, 15: 16}
    with caplog.at_level(logging.WARNING, "partial_fc.data"):
        batches = global_batches(reader, 1, steps=6)
        mine = stream(reader)
        for _ in range(6):
            mine.next_batch()
    ids = SampleOrder(24, seed=1).sample_ids(np.arange(48))
    expected = [stands_in.get(sample, sample) for sample in ids.tolist()]
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == expected
    assert torch.cat([batch.labels for batch in batches]).tolist() == [100 + sample for sample in expected]
    levels = torch.cat([batch.images.mean(dim=(1, 2, 3)) for batch in batches]) * 127.5 + 127.5
    assert np.allclose(levels.numpy(), np.array(expected) * 10 % 250, atol=2)
    # Two epochs.
    assert mine.decode_errors == {"image": 6, "record": 2, "label": 2}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 * 5
    assert any("train.rec: sample 5 can't be used (image), sample 7 takes its place: 16 bytes" in m for m in messages)


def test_too_many_bad_samples_end_the_run(tmp_path: Path) -> None:
    reader = data_set(tmp_path, bad={3: b"no image, really"})
    mine = stream(reader, max_bad_share=0.02, min_samples=40)
    with pytest.raises(
        DataError, match=r"train.rec: [12] of (40|48) samples.*'image': [12].*at most 0.02.*max_bad_share"
    ):
        for _ in range(20):
            mine.next_batch()
    tolerant = stream(reader, max_bad_share=0.06, min_samples=40)
    for _ in range(20):
        tolerant.next_batch()


@pytest.mark.timeout(60)
def test_a_data_set_without_a_good_sample_is_refused(tmp_path: Path) -> None:
    reader = data_set(tmp_path, bad={sample: b"no image, really" for sample in range(24)})
    with pytest.raises(DataError, match="none of the 24 samples from .* on can be used, the first: 16 bytes"):
        stream(reader).next_batch()


@pytest.mark.timeout(60)
def test_an_exception_in_the_background_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = stream(data_set(tmp_path))
    mine.next_batch()

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(mine._samples, "decode", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in range(5):
            mine.next_batch()
    mine.close()


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    reader = data_set(tmp_path)
    with pytest.raises(ConfigError, match="batch of 8 can't be split over 9 ranks"):
        stream(reader, world_size=9)
    with pytest.raises(ConfigError, match="got -8"):
        stream(reader, position=-8)
    with pytest.raises(ConfigError, match="must be 1 or more, got 0"):
        stream(reader, threads=0)
    with pytest.raises(ConfigError, match="order is of 23 samples, the data set has 24"):
        options = dict(batch_size=8, rank=0, world_size=1, image_size=SIDE, augmentation=Augmentation(), seed=0)
        PythonStream(reader, SampleOrder(23, 0), **options)
