"""The streams that ``data.py`` compares: ours, DALI's own reader, and PyTorch's DataLoader, on the same RecordIO files.

Each is an endless iterator of batches that a training loop could take as they are. The peers are written as somebody
would who knows them well; none of their settings was left slow. Legend: b images of a batch, S side in pixels.
"""

from __future__ import annotations

import importlib
import io
import mmap
import random
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from partial_fc.data import Augmentation, SampleOrder, Sources, open_archive, open_stream

_LENGTH_MASK = (1 << 29) - 1


@dataclass(frozen=True)
class Work:
    """What every contender does.

    Attributes:
        record: a ``.rec`` file, with its ``.idx`` and ``property`` beside it.
        index: an ``.idx`` of its image records only, by :func:`write_image_index`.
        batch: b.
        threads: that decode in this process (ours, DALI's reader).
        workers: processes of the DataLoader.
        prefetch: batches that are decoded ahead; for the DataLoader, of each worker.
        image_size: S, that of the images in the file.
        seed: of order and flips.
        device: ``cpu`` or ``cuda``, where the images go.
        augment: arguments of ``Augmentation``, for ours alone.
    """

    record: str
    index: str
    batch: int = 128
    threads: int = 2
    workers: int = 2
    prefetch: int = 2
    image_size: int = 112
    seed: int = 1
    device: str = "cpu"
    augment: dict[str, Any] = field(default_factory=dict)


class Images(NamedTuple):
    """A batch: float32 ``[b, 3, S, S]``, RGB, -1 to 1; int64 labels ``[b]``; int64 sample ids ``[b]`` where known."""

    images: Tensor
    labels: Tensor
    ids: Tensor | None


Batches = Generator[Images, None, None]


class Contender(NamedTuple):
    """Title for tables, how to open its stream, and whether it needs DALI."""

    title: str
    open: Callable[[Work], Batches]
    dali: bool


def write_image_index(record: Path, index: Path) -> int:
    """Write an ``.idx`` that has the lines of image records only, keys from 1 on, and return their number N.

    DALI's reader hands on every record that the index names, also header and identity records, which hold no image.
    A header record has key 0 and two or more labels, the first one past the last image's key.
    """
    lines = np.loadtxt(record.with_suffix(".idx"), dtype=np.int64, ndmin=2)
    keys, offsets = lines[np.argsort(lines[:, 0], kind="stable")].T
    if keys[0] == 0:
        with open(record, "rb") as file:
            file.seek(int(offsets[0]))
            flag, end = struct.unpack("<8xI20xf", file.read(36))
        if flag > 1:
            offsets = offsets[1 : int(end)]
    index.write_text("".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets.tolist(), start=1)))
    return len(offsets)


def _ours_with_dali(work: Work) -> Batches:
    return _ours("dali", work)


def _ours_in_python(work: Work) -> Batches:
    return _ours("python", work)


def _ours(decoder: str, work: Work) -> Batches:
    # The table of the file goes beside the index, not beside the data.
    sources = Sources([open_archive(work.record, cache=Path(work.index).parent)])
    stream = open_stream(
        decoder,
        sources,
        SampleOrder(len(sources), work.seed),
        batch_size=work.batch,
        rank=0,
        world_size=1,
        image_size=work.image_size,
        augmentation=Augmentation(**work.augment),
        seed=work.seed,
        threads=work.threads,
        prefetch=work.prefetch,
        device=work.device,
    )
    with stream:
        while True:
            batch = stream.next_batch()
            yield Images(batch.images, batch.labels, batch.sample_ids)


def _dali_reader(work: Work) -> Batches:
    """DALI's ``readers.mxnet``: it shuffles within a window of 1024 records, ours over the whole file."""
    dali: Any = importlib.import_module("nvidia.dali")
    fn: Any = importlib.import_module("nvidia.dali.fn")
    types: Any = importlib.import_module("nvidia.dali.types")
    plugin: Any = importlib.import_module("nvidia.dali.plugin.pytorch")
    gpu = work.device == "cuda"

    @dali.pipeline_def(
        batch_size=work.batch,
        num_threads=work.threads,
        device_id=torch.cuda.current_device() if gpu else None,
        prefetch_queue_depth=work.prefetch,
    )
    def pipeline() -> Any:
        encoded, labels = fn.readers.mxnet(
            path=[work.record], index_path=[work.index], random_shuffle=True, seed=work.seed, name="reader"
        )
        images = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)
        mirror = fn.random.coin_flip(probability=0.5, seed=work.seed + 1)
        images = fn.crop_mirror_normalize(
            images, mirror=mirror, dtype=types.FLOAT, output_layout="CHW", mean=[127.5] * 3, std=[127.5] * 3
        )
        return images, labels

    batches = plugin.DALIGenericIterator(
        [pipeline()],
        ["images", "labels"],
        reader_name="reader",
        auto_reset=True,
        last_batch_policy=plugin.LastBatchPolicy.PARTIAL,
    )
    while True:
        for batch in batches:
            # One label or more a record, as float32; the first is the class.
            labels = batch[0]["labels"].reshape(len(batch[0]["images"]), -1)[:, 0]
            yield Images(batch[0]["images"], labels.long(), None)


class RecordDataset(Dataset[tuple[Tensor, int]]):
    """A RecordIO file for the DataLoader: memory-mapped, decoded, flipped at random, as a normalised tensor.

    Args:
        record: the ``.rec`` file.
        index: its images, by :func:`write_image_index`.
        decode: encoded bytes to uint8 ``[S, S, 3]``, RGB.
    """

    def __init__(self, record: str, index: str, decode: Callable[[bytes], np.ndarray]) -> None:
        self._record, self._decode = record, decode
        self._offsets = np.loadtxt(index, dtype=np.int64, ndmin=2)[:, 1]
        self._mean = self._std = torch.full((3, 1, 1), 0.5)
        # Each worker maps the file itself.
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        """N."""
        return len(self._offsets)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """An image, float32 ``[3, S, S]``, and its label."""
        if self._map is None:
            with open(self._record, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        offset = int(self._offsets[row])
        _, word, flag, label = struct.unpack_from("<IIIf", self._map, offset)
        if word >> 29:
            raise ValueError(f"{self._record}, byte {offset}: a record in parts, which only ours and MXNet read")
        if flag:
            (label,) = struct.unpack_from("<f", self._map, offset + 32)
        image = self._decode(self._map[offset + 32 + 4 * flag : offset + 8 + (word & _LENGTH_MASK)])
        if random.random() < 0.5:
            image = cv2.flip(image, 1)
        # What torchvision's ToTensor and Normalize(0.5, 0.5, inplace=True) do.
        tensor = torch.from_numpy(image.transpose(2, 0, 1)).contiguous().float().div_(255)
        return tensor.sub_(self._mean).div_(self._std), int(label)


def decode_opencv(encoded: bytes) -> np.ndarray:
    """By OpenCV: uint8 ``[S, S, 3]``, RGB."""
    image = cv2.imdecode(np.frombuffer(encoded, dtype=np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"{len(encoded)} bytes that OpenCV can't decode")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def decode_pillow(encoded: bytes) -> np.ndarray:
    """By Pillow: uint8 ``[S, S, 3]``, RGB."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.array(image.convert("RGB"))


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _loader(work: Work, decode: Callable[[bytes], np.ndarray]) -> Batches:
    gpu = work.device == "cuda"
    loader = DataLoader(
        RecordDataset(work.record, work.index, decode),
        batch_size=work.batch,
        shuffle=True,
        num_workers=work.workers,
        persistent_workers=True,
        prefetch_factor=work.prefetch,
        pin_memory=gpu,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(work.seed),
    )
    while True:
        for images, labels in loader:
            yield Images(images.to(work.device, non_blocking=True) if gpu else images, labels, None)


def _loader_with_opencv(work: Work) -> Batches:
    return _loader(work, decode_opencv)


def _loader_with_pillow(work: Work) -> Batches:
    return _loader(work, decode_pillow)


CONTENDERS = {
    "ours-dali": Contender("ours, DALI", _ours_with_dali, True),
    "ours-python": Contender("ours, plain Python", _ours_in_python, False),
    "dali-reader": Contender("DALI's own reader", _dali_reader, True),
    "loader-opencv": Contender("DataLoader + OpenCV", _loader_with_opencv, False),
    "loader-pillow": Contender("DataLoader + Pillow", _loader_with_pillow, False),
}
