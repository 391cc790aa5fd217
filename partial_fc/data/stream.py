"""The endless stream of batches: replacement of bad samples, counting, and the stream that decodes in plain Python.

Legend: B global batch, b this rank's part of it, S side of the images in pixels.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from partial_fc.data.augment import Augmentation, pixel_matrices
from partial_fc.data.decode import decode_image, normalise, visible_damage, warp_image
from partial_fc.data.order import SampleOrder, local_positions
from partial_fc.data.readers import RecordReader
from partial_fc.errors import ConfigError, DataError

logger = logging.getLogger("partial_fc.data")

# How many ids after a bad sample are looked at for a good one.
_SEARCH = 10_000
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


@dataclass
class Samples:
    """Rows of a batch before they are decoded.

    Attributes:
        ids: int64 ``[n]``, the samples, replacements included.
        labels: int64 ``[n]``.
        encoded: n encoded images.
        bad: the samples that were replaced, by their row.
    """

    ids: np.ndarray
    labels: np.ndarray
    encoded: list[np.ndarray]
    bad: dict[int, int] = field(default_factory=dict)


class GoodSamples:
    """Reads samples, and takes the next good one (id + 1, + 2, ... modulo N, with its label) for one that is bad.

    What is bad depends on the sample alone, so the same sample gets the same replacement at any world size.

    Args:
        reader: the data set.
        image_size: S.
        max_bad_share: the share of bad samples that is put up with.
        min_samples: how many samples are counted before that share means anything.
    """

    def __init__(self, reader: RecordReader, image_size: int, *, max_bad_share: float, min_samples: int) -> None:
        self.errors: Counter[str] = Counter()
        self._reader = reader
        self._image_size = image_size
        self._max_bad_share = max_bad_share
        self._min_samples = min_samples
        self._consumed = 0
        # Kind and reason by sample id.
        self._known: dict[int, tuple[str, str]] = {}
        self._named: set[int] = set()

    def read(self, ids: np.ndarray) -> Samples:
        """Read these samples, int64 ``[n]``; those that are known or seen to be bad, undecoded, are replaced."""
        samples = Samples(ids.copy(), np.zeros(len(ids), dtype=np.int64), [])
        for row, sample in enumerate(ids.tolist()):
            if sample in self._known:
                samples.ids[row] = self._good(sample)[0]
                samples.bad[row] = sample
        try:
            samples.labels = self._reader.labels(samples.ids)
            samples.encoded = self._reader.encoded(samples.ids)
            suspects = [row for row, data in enumerate(samples.encoded) if visible_damage(data)]
        except DataError:
            # One or more of the records; each is then looked at by itself.
            samples.encoded = [np.empty(0, dtype=np.uint8)] * len(ids)
            suspects = list(range(len(ids)))
        for row in suspects:
            self.replace(samples, row)
        return samples

    def replace(self, samples: Samples, row: int) -> np.ndarray:
        """Put the next good sample into a row, in place (the row's own sample where that is good): its image.

        Raises:
            DataError: there is none.
        """
        first = int(samples.ids[row])
        samples.ids[row], samples.labels[row], samples.encoded[row], image = self._good(first)
        if samples.ids[row] != first:
            samples.bad[row] = first
        return image

    def decode(self, samples: Samples, augmentation: Augmentation, parameters: np.ndarray, out: np.ndarray) -> None:
        """Decode and augment rows; those that can't be decoded are replaced, in place.

        Args:
            samples: n rows.
            augmentation: what ``parameters`` were made by.
            parameters: float32 ``[n, 7]``.
            out: uint8 ``[n, S, S, 3]``, is filled.
        """
        matrices = pixel_matrices(parameters, self._image_size) if augmentation.affine else None
        for row, encoded in enumerate(samples.encoded):
            try:
                image = decode_image(encoded, self._image_size)
            except DataError:
                image = self.replace(samples, row)
            if matrices is not None:
                image = warp_image(image, matrices[row], augmentation.fill)
            out[row] = image[:, ::-1] if parameters[row, 0] else image

    def count(self, samples: Samples) -> None:
        """Count rows that are handed out, and name each bad sample once in the log.

        Raises:
            DataError: more than the share that is put up with are bad.
        """
        self._consumed += len(samples.ids)
        for row, sample in samples.bad.items():
            kind, reason = self._known[sample]
            self.errors[kind] += 1
            if sample not in self._named:
                self._named.add(sample)
                logger.warning(
                    "%s: sample %d can't be used (%s), sample %d takes its place: %s",
                    *(self._reader.path, sample, kind, samples.ids[row], reason),
                )
        bad = self.errors.total()
        if self._consumed >= self._min_samples and bad > self._max_bad_share * self._consumed:
            raise DataError(
                f"{self._reader.path}: {bad} of {self._consumed} samples can't be used ({dict(self.errors)}), at most "
                f"{self._max_bad_share:.3g} of them may: copy the data again, or raise data.max_bad_share"
            )

    def _good(self, first: int) -> tuple[int, int, np.ndarray, np.ndarray]:
        """Find the first good sample from an id on: its id, label, encoded image and image."""
        reach = min(len(self._reader), _SEARCH)
        for step in range(reach):
            sample = (first + step) % len(self._reader)
            if sample not in self._known and (found := self._open(sample)) is not None:
                return (sample, *found)
        raise DataError(
            f"{self._reader.path}: none of the {reach} samples from {first} on can be used, the first: "
            f"{self._known[first][1]}"
        )

    def _open(self, sample: int) -> tuple[int, np.ndarray, np.ndarray] | None:
        """Read and decode one sample: label, encoded image, image; None where that fails, which is then known."""
        kind, ids = "record", np.array([sample])
        try:
            encoded = self._reader.encoded(ids)[0]
            kind = "label"
            label = int(self._reader.labels(ids)[0])
            kind = "image"
            return label, encoded, decode_image(encoded, self._image_size)
        except DataError as error:
            self._known[sample] = kind, str(error)
            return None


class SampleStream(ABC):
    """The endless stream of batches: what the decoders have in common.

    A rank's batch is a function of (seeds, position, rank, world size); the global batch, of (seeds, position) alone.

    Args:
        reader: the data set.
        order: which sample stands at which position.
        batch_size: B, the global batch.
        rank: this process.
        world_size: W.
        image_size: S; images of another size are resized.
        augmentation: what is done to the images.
        seed: of the augmentation.
        position: of the first batch.
        threads: how many threads decode.
        prefetch: how many batches are decoded ahead.
        device: where the images go.
        max_bad_share: the share of samples that may be bad and are replaced by their next good one; counted per rank.
        min_samples: how many samples a rank counts before that share means anything.

    Raises:
        ConfigError: B is less than W, or an argument is out of its range.
    """

    def __init__(
        self,
        reader: RecordReader,
        order: SampleOrder,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        image_size: int,
        augmentation: Augmentation,
        seed: int,
        position: int = 0,
        threads: int = 2,
        prefetch: int = 2,
        device: str | torch.device = "cpu",
        max_bad_share: float = 0.01,
        min_samples: int = 1000,
    ) -> None:
        if order.num_samples != len(reader):
            raise ConfigError(f"the order is of {order.num_samples} samples, the data set has {len(reader)}")
        if threads < 1 or prefetch < 1 or image_size < 1:
            raise ConfigError(
                f"threads, prefetch and image_size must be 1 or more, got {threads}, {prefetch}, {image_size}"
            )
        self.batch_size, self.image_size = batch_size, image_size
        self.device = torch.device(device)
        self._rows = local_positions(0, batch_size, rank, world_size)
        self._order, self._augmentation, self._seed = order, augmentation, seed
        self._threads, self._prefetch = threads, prefetch
        self._samples = GoodSamples(reader, image_size, max_bad_share=max_bad_share, min_samples=min_samples)
        self._ids: dict[int, np.ndarray] = {}
        self._position = 0
        self.seek(position)

    @property
    def position(self) -> int:
        """Position of the next global batch's first sample."""
        return self._position

    @property
    def decode_errors(self) -> Counter[str]:
        """Bad samples among those handed out so far to this rank, by kind: ``record``, ``label``, ``image``."""
        return self._samples.errors

    def next_batch(self) -> Batch:
        """Give this rank's part of the global batch at ``position``, and move on by B.

        Raises:
            DataError: too many samples are bad, or the data set's file can't be read.
        """
        images, samples = self._produce(self._position)
        self._samples.count(samples)
        positions = torch.from_numpy(self._position + self._rows)
        self._position += self.batch_size
        return Batch(images, torch.from_numpy(samples.labels), torch.from_numpy(samples.ids), positions)

    def seek(self, position: int) -> None:
        """Go on with the global batch whose first sample stands at ``position``; what was decoded ahead is dropped."""
        if position < 0:
            raise ConfigError(f"a position of the sample stream is 0 or more, got {position}")
        self.close()
        self._position = position

    @abstractmethod
    def _produce(self, position: int) -> tuple[Tensor, Samples]:
        """Give the images of a batch, and its samples; the calls' positions follow each other."""

    @abstractmethod
    def close(self) -> None:
        """End the threads and drop what was decoded ahead. The next call of ``next_batch`` starts them again."""

    def __enter__(self) -> SampleStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sample_ids(self, position: int) -> np.ndarray:
        """This rank's samples of the global batch at ``position``, before any replacement."""
        if position not in self._ids:
            starts = position + self.batch_size * np.arange(_LOOKAHEAD)
            ids = self._order.sample_ids((starts[:, None] + self._rows).ravel())
            self._ids = dict(zip(starts.tolist(), ids.reshape(_LOOKAHEAD, -1), strict=True))
        return self._ids[position]

    def _parameters(self, position: int) -> np.ndarray:
        """Augmentation parameters of this rank's rows, float32 ``[b, 7]``."""
        return self._augmentation.parameters(self._seed, position + self._rows)


class PythonStream(SampleStream):
    """The stream with images decoded in threads of this process; its arguments are those of :class:`SampleStream`."""

    _pool: ThreadPoolExecutor | None = None

    def _produce(self, position: int) -> tuple[Tensor, Samples]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
            self._ahead: deque[tuple[np.ndarray, list[Future[Samples]]]] = deque()
        while len(self._ahead) <= self._prefetch:
            self._ahead.append(self._submit(self._pool, position + len(self._ahead) * self.batch_size))
        pixels, futures = self._ahead.popleft()
        # An exception of a thread is raised here.
        parts = [future.result() for future in futures]
        joined = Samples(
            np.concatenate([part.ids for part in parts]), np.concatenate([part.labels for part in parts]), []
        )
        for part in parts:
            joined.bad.update({len(joined.encoded) + row: sample for row, sample in part.bad.items()})
            joined.encoded += part.encoded
        return normalise(pixels, self.device), joined

    def close(self) -> None:
        """End the threads and drop what was decoded ahead. The next call of ``next_batch`` starts them again."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _submit(self, pool: ThreadPoolExecutor, position: int) -> tuple[np.ndarray, list[Future[Samples]]]:
        """Start to decode a batch, cut into a piece per thread: where the pixels come, and the pieces' results."""
        ids, parameters = self._sample_ids(position), self._parameters(position)
        pixels = np.empty((len(ids), self.image_size, self.image_size, 3), dtype=np.uint8)
        edges = [piece * len(ids) // self._threads for piece in range(self._threads + 1)]
        pieces = [slice(first, last) for first, last in zip(edges, edges[1:], strict=False) if first < last]
        return pixels, [pool.submit(self._decode, ids[rows], parameters[rows], pixels[rows]) for rows in pieces]

    def _decode(self, ids: np.ndarray, parameters: np.ndarray, out: np.ndarray) -> Samples:
        samples = self._samples.read(ids)
        self._samples.decode(samples, self._augmentation, parameters, out)
        return samples
