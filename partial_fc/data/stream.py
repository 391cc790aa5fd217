"""The endless stream of batches, and the stream that decodes in plain Python.

Legend: B global batch, b this rank's part of it, S side of the images in pixels, K augmentation parameters.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partial_fc.data.augment import Augmentation
from partial_fc.data.decode import normalise_into
from partial_fc.data.faults import GoodSamples, Rows
from partial_fc.data.order import Order, local_positions
from partial_fc.data.sources import Sources
from partial_fc.errors import ConfigError

# Steps of which the sample ids are worked out at once: the permutation costs about as much for one as for sixteen.
_LOOKAHEAD = 16


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images: float32 ``[b, 3, S, S]`` on the stream's device: RGB, (level - 127.5) / 127.5.
        labels: int64 ``[b]``, global class ids, on the CPU.
        sample_ids: int64 ``[b]``, the samples that the images show, replacements included; on the CPU.
        positions: int64 ``[b]``, where the rows stand in the sample stream; on the CPU.
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    positions: Tensor


class SampleStream(ABC):
    """The endless stream of batches: what the decoders have in common.

    A rank's batch is a function of (seeds, position, rank, world size); the global batch, of (seeds, position) alone.

    Args:
        sources: the data set.
        order: which sample stands at which position.
        batch_size: B, the global batch.
        rank: this process.
        world_size: W.
        image_size: S; images of another size are resized.
        augmentation: what is done to the images.
        seed: of the augmentation.
        position: of the first batch.
        threads: how many threads decode.
        readers: how many threads read ahead of a decoder that doesn't read by itself (DALI).
        prefetch: how many batches are decoded ahead.
        device: where the images go.
        max_image_pixels: images with more count as bad, and are never decoded.
        max_bad_share: the share of samples that may be bad and are replaced; counted per rank.
        min_samples: how many samples a rank counts before that share means anything.

    Raises:
        ConfigError: B is less than W, or an argument is out of its range.
    """

    def __init__(
        self,
        sources: Sources,
        order: Order,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        image_size: int,
        augmentation: Augmentation,
        seed: int,
        position: int = 0,
        threads: int = 2,
        readers: int = 2,
        prefetch: int = 2,
        device: str | torch.device = "cpu",
        max_image_pixels: int = 1 << 26,
        max_bad_share: float = 0.01,
        min_samples: int = 1000,
    ) -> None:
        if order.num_samples != len(sources):
            raise ConfigError(f"the order is of {order.num_samples} samples, the data set has {len(sources)}")
        if threads < 1 or readers < 1 or prefetch < 1 or image_size < 1:
            raise ConfigError(
                "threads, readers, prefetch and image_size must be 1 or more, "
                f"got {threads}, {readers}, {prefetch}, {image_size}"
            )
        self.batch_size, self.image_size = batch_size, image_size
        self.device = torch.device(device)
        self._rows = local_positions(0, batch_size, rank, world_size)
        self._order, self._augmentation, self._seed = order, augmentation, seed
        self._threads, self._readers, self._prefetch = threads, readers, prefetch
        self._samples = GoodSamples(
            sources,
            order,
            image_size,
            max_image_pixels=max_image_pixels,
            max_bad_share=max_bad_share,
            min_samples=min_samples,
        )
        self._ids: dict[int, np.ndarray] = {}
        self._position = 0
        self.seek(position)

    @property
    def decoder(self) -> str:
        """What decodes the images: ``dali`` or ``python``."""
        return "python"

    @property
    def position(self) -> int:
        """Position of the next global batch's first sample."""
        return self._position

    @property
    @abstractmethod
    def ready(self) -> int:
        """Batches that are ready ahead of the training; what is under way doesn't count."""

    @property
    def room(self) -> int:
        """The most that :attr:`ready` can be."""
        return self._prefetch

    @property
    def decode_errors(self) -> Counter[str]:
        """Bad samples among those handed out so far to this rank, by kind (``faults.FAULT_KINDS``)."""
        return self._samples.errors

    def next_batch(self) -> Batch:
        """Give this rank's part of the global batch at ``position``, and move on by B.

        Raises:
            DataError: too many samples are bad, or the data set's file can't be read.
        """
        try:
            images, rows = self._produce(self._position)
            self._samples.count(rows)
        except BaseException:
            # What was decoded ahead is of later positions; the next call begins at this one again.
            self.close(wait=False)
            raise
        self._position += self.batch_size
        columns = (torch.from_numpy(column) for column in (rows.labels, rows.ids, rows.positions))
        return Batch(images, *columns)

    def seek(self, position: int) -> None:
        """Go on with the global batch whose first sample stands at ``position``; what was decoded ahead is dropped."""
        if position < 0:
            raise ConfigError(f"a position of the sample stream is 0 or more, got {position}")
        self.close()
        self._position = position

    @abstractmethod
    def _produce(self, position: int) -> tuple[Tensor, Rows]:
        """Give the images of a batch, and its rows; the calls' positions follow each other."""

    @abstractmethod
    def close(self, *, wait: bool = True) -> None:
        """End the threads and drop what was decoded ahead. The next call of ``next_batch`` starts them again.

        Args:
            wait: for what the threads do just now, which may be reading from a disk that doesn't answer.
        """

    def __enter__(self) -> SampleStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait=kind is None)

    def _sample_ids(self, position: int) -> np.ndarray:
        """This rank's samples of the global batch at ``position``, before any replacement."""
        if position not in self._ids:
            starts = position + self.batch_size * np.arange(_LOOKAHEAD)
            ids = self._order.sample_ids((starts[:, None] + self._rows).ravel())
            self._ids = dict(zip(starts.tolist(), ids.reshape(_LOOKAHEAD, -1), strict=True))
        return self._ids[position]

    def _parameters(self, position: int) -> np.ndarray:
        """Augmentation parameters of this rank's rows, float32 ``[b, K]``."""
        return self._augmentation.parameters(self._seed, position + self._rows)


class Uploads:
    """Brings batches to a GPU, or, where the device is the CPU, has them normalised where they are decoded.

    To a GPU go levels, a quarter of the bytes, from pinned memory, on a stream of its own beside the computation;
    they're normalised there. Memory is used again once nobody has its batch any more: new memory for each batch would
    cost a tenth of the time in page faults, and its pieces would pile up.

    Args:
        device: where the images go.
        shape: ``(b, S, S, 3)``.
    """

    def __init__(self, device: torch.device, shape: tuple[int, int, int, int]) -> None:
        self._device, self._shape = device, shape
        self._cuda = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None
        # Pinned memory, and what tells that its last batch has left it.
        self._used: deque[tuple[Tensor, Any]] = deque()
        # Of the CPU.
        self._free: deque[np.ndarray] = deque()

    def buffer(self) -> Tensor:
        """What a batch is decoded into: uint8 ``[b, S, S, 3]`` for a GPU, else float32 ``[b, 3, S, S]``."""
        if not self._cuda:
            b, height, width, channels = self._shape
            try:
                memory = self._free.popleft()
            except IndexError:
                memory = np.empty((b, channels, height, width), dtype=np.float32)
            # The tensor's storage holds this view, and nothing else does.
            view = memory.view()
            weakref.finalize(view, self._free.append, memory).atexit = False
            return torch.from_numpy(view)
        if self._used and self._used[0][1].query():
            return self._used.popleft()[0]
        return torch.empty(self._shape, dtype=torch.uint8, pin_memory=True)

    def fill(self, buffer: Tensor, row: int, image: np.ndarray) -> None:
        """Put an image, uint8 ``[S, S, 3]``, into a row of a buffer."""
        if self._cuda:
            buffer[row].numpy()[...] = image
        else:
            normalise_into(image, buffer[row].numpy())

    def send(self, buffer: Tensor) -> Tensor:
        """Give the batch, float32 ``[b, 3, S, S]``, on the device; the buffer is no longer the caller's."""
        if not self._cuda:
            return buffer.to(self._device)
        with torch.cuda.stream(self._stream):
            levels = buffer.to(self._device, non_blocking=True)
            left = torch.cuda.Event()
            left.record()
            # With the channels innermost in memory, as they came and as convolutions want them.
            images = levels.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)
        self._used.append((buffer, left))
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        # Its memory belongs to the other stream's pool, and isn't given away before this stream is done with it.
        images.record_stream(current)
        return images


class PythonStream(SampleStream):
    """The stream with images decoded in threads of this process; its arguments are those of :class:`SampleStream`."""

    _pool: ThreadPoolExecutor | None = None

    @property
    def ready(self) -> int:
        """Batches that are decoded ahead of the training."""
        if self._pool is None:
            return 0
        return sum(all(future.done() for future in futures) for _, futures in self._ahead)

    def _produce(self, position: int) -> tuple[Tensor, Rows]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
            self._uploads = Uploads(self.device, (len(self._rows), self.image_size, self.image_size, 3))
            self._ahead: deque[tuple[Tensor, list[Future[Rows]]]] = deque()
        while len(self._ahead) <= self._prefetch:
            self._ahead.append(self._submit(self._pool, position + len(self._ahead) * self.batch_size))
        buffer, futures = self._ahead.popleft()
        # An exception of a thread is raised here.
        parts = [future.result() for future in futures]
        joined = Rows(
            np.concatenate([part.positions for part in parts]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.labels for part in parts]),
            [],
        )
        for part in parts:
            joined.bad.update({len(joined.encoded) + row: sample for row, sample in part.bad.items()})
            joined.encoded += part.encoded
        return self._uploads.send(buffer), joined

    def close(self, *, wait: bool = True) -> None:
        """End the threads and drop what was decoded ahead. The next call of ``next_batch`` starts them again."""
        if self._pool is not None:
            self._pool.shutdown(wait=wait, cancel_futures=True)
            self._pool = None

    def _submit(self, pool: ThreadPoolExecutor, position: int) -> tuple[Tensor, list[Future[Rows]]]:
        """Start to decode a batch, cut into a piece per thread: where the images come, and the pieces' results."""
        ids, buffer = self._sample_ids(position), self._uploads.buffer()
        edges = [piece * len(ids) // self._threads for piece in range(self._threads + 1)]
        pieces = [slice(first, last) for first, last in zip(edges, edges[1:], strict=False) if first < last]
        return buffer, [
            pool.submit(self._decode, position + self._rows[piece], ids[piece], buffer[piece]) for piece in pieces
        ]

    def _decode(self, positions: np.ndarray, ids: np.ndarray, out: Tensor) -> Rows:
        rows = self._samples.read(positions, ids)
        parameters = self._augmentation.parameters(self._seed, positions)
        for row, image in enumerate(self._samples.decode(rows, self._augmentation, parameters)):
            self._uploads.fill(out, row, image)
        return rows
