from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from partial_fc.data import dali
from partial_fc.data.archives import open_archive
from partial_fc.data.augment import Augmentation
from partial_fc.data.dali import DaliStream, dali_available, open_stream
from partial_fc.data.order import SampleOrder
from partial_fc.data.pipeline import define_pipeline
from partial_fc.data.sources import Sources
from partial_fc.data.stream import PythonStream, SampleStream
from partial_fc.errors import ConfigError, DataError
from tests import records

needs_dali = pytest.mark.skipif(
    not dali_available(), reason="NVIDIA DALI isn't installed (pip install nvidia-dali-cuda130)"
)
SIDE = 64
AFFINE = Augmentation(flip=0.5, rotate=0.3, scale=0.1, shift=0.1, fill=200)


def image(seed: int, height: int = SIDE, width: int = SIDE) -> bytes:
    return records.encode(records.smooth_image(seed, height, width), quality=90)


def data_set(folder: Path, bad: dict[int, bytes] | None = None) -> Sources:
    """24 images, two of another size and one in parts; some replaced by other bytes."""
    images = [image(i) for i in range(24)]
    images[3], images[4] = image(3, 150, 100), records.encode(records.smooth_image(4, 40, 40), "PNG")
    padding = b"\0" * (-len(images[7]) % 4)
    images[7] += padding + np.uint32(records.MAGIC).tobytes() + b"tail"
    for sample, data in (bad or {}).items():
        images[sample] = data
    return Sources([open_archive(records.write_new(folder, images, list(range(24)), classes=24))])


def open_(kind: str, reader: Sources, rank: int = 0, world_size: int = 1, **changes) -> SampleStream:
    options = dict(batch_size=8, image_size=SIDE, augmentation=Augmentation(), seed=4, min_samples=10**6)
    options |= dict(rank=rank, world_size=world_size)
    return open_stream(kind, reader, SampleOrder(len(reader), seed=1), **(options | changes))


def assert_same_batches(mine: SampleStream, theirs: SampleStream, steps: int) -> None:
    """Equal, and images within one level (a tie that the decoders round differently), hardly ever that much."""
    for _ in range(steps):
        assert mine.position == theirs.position
        a, b = mine.next_batch(), theirs.next_batch()
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert torch.equal(a.positions, b.positions)
        assert a.images.shape == b.images.shape and a.images.dtype == torch.float32 and a.images.is_contiguous()
        levels = (a.images - b.images).abs() * 127.5
        assert levels.max() < 1.01 and levels.mean() < 0.1
    assert mine.decode_errors == theirs.decode_errors


@needs_dali
@pytest.mark.parametrize(
    "augmentation", [Augmentation(flip=0), Augmentation(), AFFINE], ids=["as is", "flip", "affine"]
)
def test_images_are_those_of_the_plain_decoder(augmentation: Augmentation, tmp_path: Path) -> None:
    reader = data_set(tmp_path)
    with open_("dali", reader, augmentation=augmentation) as mine:
        assert isinstance(mine, DaliStream)
        assert_same_batches(mine, open_("python", reader, augmentation=augmentation), steps=4)


@needs_dali
def test_ranks_and_positions(tmp_path: Path) -> None:
    reader = data_set(tmp_path)
    for rank in range(3):
        with open_("dali", reader, rank, 3, position=16) as mine:
            theirs = open_("python", reader, rank, 3, position=16)
            assert_same_batches(mine, theirs, steps=2)
            for stream in (mine, theirs):
                stream.seek(80)
            assert_same_batches(mine, theirs, steps=1)


@needs_dali
def test_bad_samples_are_replaced_as_in_the_plain_decoder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = image(0)
    # What shows before the decoder sees it (6, 9), and what only the decoder finds (5, 12, 13): DALI fails at these.
    bad = {5: b"no image, really", 12: good[:30] + b"\xff\xd9", 13: b"\x89PNG\r\n\x1a\n" + bytes(50)}
    reader = data_set(tmp_path, bad | {6: good[:-40], 9: b""})
    with caplog.at_level(logging.WARNING, "partial_fc.data"), open_("dali", reader) as mine:
        # Two epochs and a bit: the second knows them.
        assert_same_batches(mine, open_("python", reader), steps=7)
        assert mine.decode_errors.total() >= 10
    named = [record.getMessage() for record in caplog.records if "takes its place" in record.getMessage()]
    assert len(named) == 2 * 5
    with open_("dali", reader, max_bad_share=0.02, min_samples=16) as strict, pytest.raises(DataError, match="at most"):
        for _ in range(4):
            strict.next_batch()


@needs_dali
def test_a_failure_of_the_data_set_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shrunk(*_: np.ndarray) -> None:
        raise DataError("train.rec: shrank while in use")

    with open_("dali", data_set(tmp_path)) as mine:
        mine.next_batch()
        monkeypatch.setattr(mine._samples, "read", shrunk)
        with pytest.raises(DataError, match="^train.rec: shrank while in use$"):
            for _ in range(9):
                mine.next_batch()


@needs_dali
def test_failures_that_are_not_the_images_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = open_("dali", data_set(tmp_path))
    monkeypatch.setattr(mine, "_start", lambda position: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(DataError, match="failed 5 times in a row at position 0.*out of memory.*data.decoder=python"):
        mine.next_batch()
    monkeypatch.undo()
    # Four failures before an image came are not five in a row.
    start, failures = mine._start, []

    def fail_four_times(at: int) -> None:
        failures.append(at)
        if failures.count(at) <= 4:
            raise RuntimeError("out of memory")
        start(at)

    monkeypatch.setattr(mine, "_start", fail_four_times)
    for position in (0, 8, 16):
        mine.seek(position)
        assert mine.next_batch().positions[0] == position
    mine.close()


@needs_dali
@pytest.mark.parametrize("augmentation", [Augmentation(), AFFINE], ids=["flip", "affine"])
def test_the_gpu_pipeline_can_be_defined(augmentation: Augmentation) -> None:
    pipeline = define_pipeline(
        lambda info: None, batch_size=4, image_size=SIDE, augmentation=augmentation, threads=1, prefetch=2, device_id=0
    )
    assert pipeline.device_id == 0


@needs_dali
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("augmentation", [Augmentation(), AFFINE], ids=["flip", "affine"])
def test_images_of_the_gpu(augmentation: Augmentation, tmp_path: Path) -> None:
    reader = data_set(tmp_path, {5: b"no image, really"})
    with open_("dali", reader, augmentation=augmentation, device="cuda") as mine:
        theirs = open_("python", reader, augmentation=augmentation)
        for _ in range(4):
            a, b = mine.next_batch(), theirs.next_batch()
            assert a.images.is_cuda and torch.equal(a.sample_ids, b.sample_ids)
            # The GPU's JPEG decoder rounds differently, in the chroma above all.
            assert ((a.images.cpu() - b.images).abs() * 127.5).mean() < 2


def test_open_stream_picks_the_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader = data_set(tmp_path)
    monkeypatch.setattr(dali, "dali_available", lambda: True)
    assert isinstance(open_("auto", reader), DaliStream)
    assert isinstance(open_("auto", reader, augmentation=AFFINE), PythonStream)
    assert isinstance(open_("dali", reader, augmentation=AFFINE), DaliStream)
    assert isinstance(open_("auto", reader, augmentation=AFFINE, device="cuda"), DaliStream)
    assert not caplog.records
    monkeypatch.setattr(dali, "dali_available", lambda: False)
    with caplog.at_level(logging.WARNING, "partial_fc.data"):
        assert isinstance(open_("auto", reader), PythonStream)
    assert [record.getMessage() for record in caplog.records] == [
        "NVIDIA DALI isn't installed: images are decoded in Python, which is slower"
    ]
    with pytest.raises(ConfigError, match="isn't installed: install nvidia-dali"):
        open_("dali", reader)
    with pytest.raises(ConfigError, match="must be 'auto', 'dali' or 'python', got 'opencv'"):
        open_("opencv", reader)


def test_dali_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError("libcuda.so.1 is missing")

    stream = DaliStream(
        data_set(tmp_path),
        SampleOrder(24, 0),
        **dict(batch_size=8, rank=0, world_size=1, image_size=SIDE, augmentation=Augmentation(), seed=0),
    )
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="can't be imported .libcuda.so.1 is missing.: install.*data.decoder=python"):
        stream.next_batch()


@needs_dali
@pytest.mark.skipif(not records.OMNIGLOT.is_dir(), reason="the Omniglot files are not beside the repository")
def test_omniglot(tmp_path: Path) -> None:
    reader = Sources([open_archive(records.OMNIGLOT, cache=tmp_path)])
    options = dict(batch_size=32, image_size=112, augmentation=AFFINE)
    with open_("dali", reader, **options) as mine:
        assert_same_batches(mine, open_("python", reader, **options), steps=2)


BAD_HEADERS = """
import sys
import numpy as np
from pathlib import Path
from partial_fc.data import Augmentation, SampleOrder, Sources, open_archive, open_stream
from tests import records
good = [records.encode(records.smooth_image(i, 64, 64), quality=90) for i in range(128)]
image = good[0]
frame, tables = image.index(b"\\xff\\xc0"), image.index(b"\\xff\\xc4")
png = records.encode(records.smooth_image(0, 64, 64), "PNG")
gif = records.encode(records.smooth_image(0, 64, 64)[..., 0], "GIF")
bad = {
    0: b"<html>404 not found</html>" * 20, 1: image[:300] + b"\\xff\\xd9", 2: png[: len(png) // 2],
    3: image[: frame + 9] + b"\\x02" + image[frame + 10 :], 40: image[:2] + b"\\xff\\xe1\\xff\\xff" + image[2:],
    64: image[: tables + 5] + b"\\xff" * 16 + image[tables + 21 :], 127: b"GIF89a" + bytes(200),
}
images = [bad.get(i, data) for i, data in enumerate(good)]
# Good, though DALI knows no GIF: they come as they are.
images[10], images[70] = gif, png
sources = Sources([open_archive(records.write_new(Path(sys.argv[1]), images, list(range(128)), classes=128))])
for batch_size in (32, 64, 128):
    options = dict(batch_size=batch_size, rank=0, world_size=1, image_size=64, augmentation=Augmentation(), seed=4)
    with open_stream("dali", sources, SampleOrder(128, 1), **options, min_samples=10**6) as mine:
        with open_stream("python", sources, SampleOrder(128, 1), **options, min_samples=10**6) as theirs:
            for _ in range(256 // batch_size):
                a, b = mine.next_batch(), theirs.next_batch()
                assert a.sample_ids.tolist() == b.sample_ids.tolist() and not set(bad) & set(a.sample_ids.tolist())
                assert ((a.images - b.images).abs() * 127.5).max() < 1.01
            assert mine.decode_errors == theirs.decode_errors and mine.decode_errors.total() == 14
            assert {10, 70} <= set(np.unique(SampleOrder(128, 1).sample_ids(np.arange(128))).tolist())
print("survived")
"""


@needs_dali
def test_headers_that_kill_dali_never_reach_it(tmp_path: Path) -> None:
    """In a process of its own: what DALI 2.4 can't parse in a large batch is a segmentation fault."""
    command = [sys.executable, "-c", BAD_HEADERS, str(tmp_path / "set")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=root)
    assert done.returncode == 0 and "survived" in done.stdout, done.stderr[-2000:]


@needs_dali
def test_images_that_dali_alone_cannot_decode_come_from_the_plain_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sources = data_set(tmp_path)
    odd = {2, 11, 17}
    real = dali._decodes
    seen = [sources.encoded(np.array([sample]))[0] for sample in odd]
    define = define_pipeline

    def choosy(source, **options):
        def check(info):
            given = source(info)
            rows = mine._given[mine_position(info)][0]
            if any(s in odd and not mine._samples.distrusts(s) for s in rows.ids.tolist()):
                raise RuntimeError("no decoder for this one")
            return given

        first = mine.position
        mine_position = lambda info: first + info.iteration * mine.batch_size  # noqa: E731
        return define(check, **options)

    monkeypatch.setattr(dali, "define_pipeline", choosy)
    monkeypatch.setattr(
        dali, "_decodes", lambda encoded, device: not any(np.array_equal(encoded, image) for image in seen)
    )
    with caplog.at_level(logging.WARNING, "partial_fc.data"), open_("dali", sources) as mine:
        assert_same_batches(mine, open_("python", sources), steps=9)
        assert [s for s in range(24) if mine._samples.distrusts(s)] == sorted(odd) and not mine.decode_errors
    assert sum("the plain decoder can" in message for message in caplog.messages) <= 3
    assert real(np.frombuffer(image(0), dtype=np.uint8), None)
    assert not real(np.frombuffer(b"no image at all", dtype=np.uint8), None)


@needs_dali
def test_what_was_handed_out_is_let_go(tmp_path: Path) -> None:
    with open_("dali", data_set(tmp_path)) as mine:
        for _ in range(20):
            mine.next_batch()
        assert len(mine._given) <= 4 and len(mine._reading) <= 4


@needs_dali
def test_a_sample_that_a_reader_found_to_be_bad_meanwhile_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DALI has it already when another thread, in search of a replacement, finds that it can't be decoded."""
    tables = image(5).index(b"\xff\xc4")
    broken = image(5)[: tables + 5] + b"\xff" * 16 + image(5)[tables + 21 :]
    sources = data_set(tmp_path, {5: broken})
    with caplog.at_level(logging.WARNING, "partial_fc.data"), open_("dali", sources) as mine:
        samples = mine._samples
        read = samples.read

        def and_then_found(positions: np.ndarray, ids: np.ndarray):
            rows = read(positions, ids)
            if 5 in rows.ids:
                samples._open(5)
            return rows

        samples.read = and_then_found  # type: ignore[method-assign]
        assert_same_batches(mine, open_("python", sources), steps=3)
        assert mine.decode_errors == {"image": 1}
    assert not any("DALI failed" in message for message in caplog.messages)
