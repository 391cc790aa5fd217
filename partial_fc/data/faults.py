"""Reading the samples of a batch, and what takes the place of those that can't be used.

A bad sample is replaced by the sample of the next position that has a good one, under its own augmentation. What is bad
depends on the sample alone, and what comes next on the order alone: so a batch is the same at any world size.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from partial_fc.data.augment import Augmentation
from partial_fc.data.decode import ImageError, decode_image, decode_pixels, look_at
from partial_fc.data.files import MachineError
from partial_fc.data.order import Order
from partial_fc.data.sources import Sources
from partial_fc.data.table import UNUSABLE
from partial_fc.data.transforms import augment_image
from partial_fc.errors import DataError

logger = logging.getLogger("partial_fc.data")

# record: its framing or its file; label: none that can be used; empty: no bytes; oversized: more pixels than allowed;
# image: bytes that are no whole image.
FAULT_KINDS = ("record", "label", "empty", "oversized", "image")
# How many positions behind a bad sample are looked at for a good one, and how many at once at first.
_SEARCH = 10_000
_SEARCH_STEP = 16
# A JPEG of the stream's size with a header that is in order; and one that a decoder failed at all the same.
_USUAL, _DISTRUSTED = 1, 2
# The first byte of a JPEG.
_JPEG = 0xFF


@dataclass
class Rows:
    """Rows of a batch before they are decoded.

    Attributes:
        positions: int64 ``[n]``, where they stand in the sample stream.
        ids: int64 ``[n]``, the samples, replacements included.
        labels: int64 ``[n]``.
        encoded: n encoded images.
        bad: the samples that were replaced, by their row.
        resized: whether one of the images isn't ``S x S``, or doesn't tell its size.
        foreign: the rows whose image isn't a JPEG with a header that is in order.
    """

    positions: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    encoded: list[np.ndarray]
    bad: dict[int, int] = field(default_factory=dict)
    resized: bool = False
    foreign: set[int] = field(default_factory=set)


class GoodSamples:
    """Reads samples, and replaces those that are bad. Threads may read at the same time.

    Args:
        sources: the data set.
        order: which sample stands at which position.
        image_size: S, side of the images in pixels.
        max_image_pixels: images with more are bad.
        max_bad_share: the share s of bad samples that is put up with. Reading ends once there are more than
            ``s n + 4 sqrt(s (1 - s) n)`` of n: so many don't come by chance, in any of many ranks.
        min_samples: how many samples are counted before that is looked at.

    Attributes:
        errors: rows handed out whose sample was replaced, by kind.
    """

    def __init__(
        self,
        sources: Sources,
        order: Order,
        image_size: int,
        *,
        max_image_pixels: int,
        max_bad_share: float,
        min_samples: int,
    ) -> None:
        self.errors: Counter[str] = Counter()
        self._sources, self._order = sources, order
        self._size, self._max_pixels = (image_size, image_size), max_image_pixels
        self._max_bad_share = max_bad_share
        self._min_samples = min_samples
        self._consumed = 0
        # What each sample is like, so that it's looked at once. Of an image folder nothing is kept: its files may be
        # written anew while they are read.
        self._state = np.zeros(len(sources), dtype=np.uint8)
        self._keeps = all(archive.format != "folder" for archive in sources.archives)
        # Kind and reason by sample id.
        self._known: dict[int, tuple[str, str]] = {}
        self._named: set[int] = set()

    def read(self, positions: np.ndarray, ids: np.ndarray) -> Rows:
        """Read the samples ``ids`` of these positions; those that are seen to be bad, undecoded, are replaced.

        Args:
            positions: int64 ``[n]``.
            ids: int64 ``[n]``, what stands there.

        Raises:
            DataError: there is no good sample to replace one by.
        """
        rows = Rows(positions, ids.copy(), self._sources.labels(ids), [])
        suspects = set(np.flatnonzero(rows.labels == UNUSABLE).tolist())
        if self._known:
            suspects.update(row for row, sample in enumerate(ids.tolist()) if sample in self._known)
        try:
            if suspects:
                # Not even looked at: what the table says of where they are may be nonsense.
                rows.encoded = [np.empty(0, dtype=np.uint8)] * len(ids)
                good = np.array([row for row in range(len(ids)) if row not in suspects], dtype=np.int64)
                for row, data in zip(good.tolist(), self._sources.encoded(ids[good]), strict=True):
                    rows.encoded[row] = data
            else:
                rows.encoded = self._sources.encoded(ids)
            suspects.update(self._look_at(rows))
        except MachineError:
            raise
        except DataError:
            # One or more of the records; each is then looked at by itself.
            rows.encoded = [np.empty(0, dtype=np.uint8)] * len(ids)
            suspects = set(range(len(ids)))
        for row in sorted(suspects):
            self.replace(rows, row)
        return rows

    def find_bad(self, rows: Rows) -> bool:
        """Decode the samples of these rows, and say whether one is bad; it's known to be from now on."""
        for sample in rows.ids.tolist():
            if sample not in self._known:
                self._open(sample)
        return any(sample in self._known for sample in rows.ids.tolist())

    def distrust(self, samples: Iterable[int]) -> None:
        """From now on these samples are among ``Rows.foreign``."""
        self._state[list(samples)] = _DISTRUSTED

    def distrusts(self, sample: int) -> bool:
        """Whether that was said of this sample."""
        return bool(self._state[sample] == _DISTRUSTED)

    def replace(self, rows: Rows, row: int) -> np.ndarray:
        """Put a good sample into a row, in place: its own where that is good after all, else one that stands behind.

        Returns:
            Its image, uint8 ``[S, S, 3]``.

        Raises:
            DataError: there is none.
        """
        first, position = int(rows.ids[row]), int(rows.positions[row])
        for sample in self._candidates(first, position):
            if sample not in self._known and (found := self._open(sample)) is not None:
                rows.ids[row], rows.labels[row], rows.encoded[row] = sample, found[0], found[1]
                self._describe(rows, row, *look_at(found[1], self._max_pixels)[1:])
                if sample != first:
                    rows.bad[row] = first
                return found[2]
        searched = min(_SEARCH, len(self._sources))
        raise DataError(
            f"{self._sources.path}: none of the {searched} samples from position {position} on can be used; "
            f"{self._sources.locate(first)}: {self._known[first][1]}"
        )

    def decode_foreign(self, rows: Rows) -> None:
        """Put pixels, as a pixmap (PPM), in place of the encoded images of ``rows.foreign``; bad ones are replaced."""
        for row in sorted(rows.foreign):
            try:
                pixels = decode_pixels(rows.encoded[row], max_pixels=self._max_pixels)
            except ImageError:
                self.replace(rows, row)
                if row not in rows.foreign:
                    continue
                pixels = decode_pixels(rows.encoded[row], max_pixels=self._max_pixels)
            head = b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0])
            rows.encoded[row] = np.frombuffer(head + pixels.tobytes(), dtype=np.uint8)

    def decode(self, rows: Rows, augmentation: Augmentation, parameters: np.ndarray) -> list[np.ndarray]:
        """Decode and augment rows; those that can't be decoded are replaced, in place.

        Args:
            rows: n rows.
            augmentation: what ``parameters`` were made by.
            parameters: float32 ``[n, K]``.

        Returns:
            n images, uint8 ``[S, S, 3]``.
        """
        images = []
        for row, encoded in enumerate(rows.encoded):
            try:
                image = decode_image(encoded, self._size[0], max_pixels=self._max_pixels)
            except ImageError:
                image = self.replace(rows, row)
            images.append(augment_image(image, augmentation, parameters[row]))
        return images

    def count(self, rows: Rows) -> None:
        """Count rows that are handed out, and name each bad sample once in the log.

        Raises:
            DataError: more than the share that is put up with are bad.
        """
        self._consumed += len(rows.ids)
        for row, sample in rows.bad.items():
            kind, reason = self._known[sample]
            self.errors[kind] += 1
            if sample not in self._named:
                self._named.add(sample)
                logger.warning(
                    "sample %d can't be used (%s), sample %d takes its place: %s", sample, kind, rows.ids[row], reason
                )
        bad, share = self.errors.total(), self._max_bad_share
        most = share * self._consumed + 4 * math.sqrt(share * (1 - share) * self._consumed)
        if self._consumed >= self._min_samples and bad > most:
            raise DataError(
                f"{self._sources.path}: {bad} of {self._consumed} samples can't be used ({dict(self.errors)}), at most "
                f"{self._max_bad_share:.3g} of them may: copy the data again, or raise data.max_bad_share"
            )

    def _look_at(self, rows: Rows) -> Iterator[int]:
        """Rows with an image that shows to be bad; notes in ``rows`` what the others are like."""
        for row in np.flatnonzero(self._state[rows.ids] != _USUAL).tolist():
            fault, width, height = look_at(rows.encoded[row], self._max_pixels)
            if fault is not None:
                yield row
            else:
                self._describe(rows, row, width, height)

    def _describe(self, rows: Rows, row: int, width: int, height: int) -> None:
        """Note what a good image is like."""
        sample = int(rows.ids[row])
        rows.foreign.discard(row)
        if (width, height) != self._size:
            rows.resized = True
        if width == 0 or rows.encoded[row][0] != _JPEG or self._state[sample] == _DISTRUSTED:
            rows.foreign.add(row)
        elif self._keeps and (width, height) == self._size:
            self._state[sample] = _USUAL

    def _candidates(self, first: int, position: int) -> Iterator[int]:
        """The sample itself, then those of the positions behind it."""
        yield first
        start, end, step = position + 1, position + _SEARCH, _SEARCH_STEP
        while start < end and len(self._known) < len(self._sources):
            yield from self._order.sample_ids(np.arange(start, min(start + step, end))).tolist()
            start, step = start + step, 2 * step

    def _open(self, sample: int) -> tuple[int, np.ndarray, np.ndarray] | None:
        """Read and decode one sample: label, encoded image, image; None where that fails, which is then known."""
        if (known := self._sources.fault(sample)) is not None:
            self._known[sample] = known.kind, known.reason
            return None
        ids = np.array([sample])
        try:
            encoded = self._sources.encoded(ids)[0]
        except MachineError:
            raise
        except DataError as error:
            self._known[sample] = "record", str(error)
            return None
        try:
            if fault := look_at(encoded, self._max_pixels)[0]:
                raise ImageError(*fault)
            image = decode_image(encoded, self._size[0], max_pixels=self._max_pixels)
        except ImageError as error:
            self._known[sample] = error.kind, f"{self._sources.locate(sample)}: {error}"
            return None
        return int(self._sources.labels(ids)[0]), encoded, image
