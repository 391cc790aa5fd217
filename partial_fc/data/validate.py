"""What ``partial-fc validate`` finds: every sample is decoded once; classes, sizes and copies are counted.

It keeps 20 bytes a sample, 0.4 GB for 20 million, which become 1 GB while classes and copies are sorted.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from partial_fc.checks import require
from partial_fc.data.archives import Archive
from partial_fc.data.decode import MAX_PIXELS, ImageError, decode_pixels
from partial_fc.data.faults import FAULT_KINDS
from partial_fc.data.files import MachineError, file_size
from partial_fc.data.findings import ClassFigures, Copies, Example, ImageFigures, Pair, Spread, ValidationReport
from partial_fc.data.pieces import cut, in_order
from partial_fc.data.sources import Sources
from partial_fc.data.table import UNUSABLE, Progress
from partial_fc.data.tfrecord import bad_checksums
from partial_fc.errors import DataError
from partial_fc.machine import processors

# How many findings of a kind are named, and how many sizes of images.
_NAMED, _SIZES = 5, 10
# Bytes of encoded images that are compared with another at once.
_COMPARED_BYTES = 1 << 20
# Most rows of the histogram of classes.
_BINS = 8


def validate(
    source: Archive | Sources,
    *,
    max_image_pixels: int = MAX_PIXELS,
    image_size: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    checksum_progress: Progress | None = None,
    sample_limit: int | None = None,
) -> ValidationReport:
    """Decode every sample of a data set, in threads, and count what there is.

    Args:
        source: the data set.
        max_image_pixels: images with more can't be used.
        image_size: side in pixels that the images should have; None: nothing is said of it.
        threads: how many decode; None: as many as this process may use processors.
        progress: called with the samples done and their number.
        checksum_progress: where records have checksums, called with the bytes that were compared with them, and all.
        sample_limit: check no more samples than this, spread evenly over the data set. All labels are counted anyway,
            and checksums, which take a read of all bytes, only where this leaves no sample out.

    Raises:
        ConfigError: an argument is out of its range.
        DataError: a file can't be read any more.
    """
    for name, value in (("threads", threads), ("image_size", image_size), ("sample_limit", sample_limit)):
        require(value is None or value >= 1, "validate", name, value, "1 or more, or None")
    started = time.monotonic()
    checked = _Checked(source, min(len(source), sample_limit or len(source)), max_image_pixels)
    checked.fill(threads or processors(), progress)
    files = _files_with_checksums(source)
    skipped = bool(files) and checked.count < len(source)
    checksums = _wrong_checksums(files, checksum_progress) if files and not skipped else None
    return ValidationReport(
        path=str(source.path),
        samples=len(source),
        checked=checked.count,
        unusable=checked.unusable,
        first=checked.first,
        bad_checksums=None if checksums is None else len(checksums),
        checksums_first=(checksums or [])[:_NAMED],
        checksums_skipped=skipped,
        classes=_class_figures(source),
        images=_image_figures(checked, image_size),
        copies=_copies(source, checked),
        image_size=image_size,
        seconds=time.monotonic() - started,
    )


class _Checked:
    """What is known of each sample that was checked; row r is sample ``r * N // count`` of N.

    Attributes:
        count: n, the number of rows.
        sizes: uint32 ``[n, 2]``, width and height of the image, upright.
        lengths: int32 ``[n]``, of the encoded image in bytes; -1 where the sample can't be used.
        hashes: uint64 ``[n]``, of the encoded image.
        grey: how many images have no colour.
        unusable, first: as in the report.
    """

    def __init__(self, source: Archive | Sources, count: int, max_image_pixels: int) -> None:
        self.count = count
        self.sizes = np.zeros((count, 2), dtype=np.uint32)
        self.lengths = np.full(count, -1, dtype=np.int32)
        self.hashes = np.zeros(count, dtype=np.uint64)
        self.grey = 0
        self.unusable = dict.fromkeys(FAULT_KINDS, 0)
        self.first: dict[str, list[Example]] = {kind: [] for kind in FAULT_KINDS}
        self._source = source
        self._max_pixels = max_image_pixels

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """Samples of these rows, int64."""
        return rows * len(self._source) // self.count

    def fill(self, threads: int, progress: Callable[[int, int], None] | None) -> None:
        """Check all rows. The pieces' findings are taken in order, so that the same samples are named each time."""
        pieces = cut(self._source, self.count, self.ids)
        with closing(in_order(self._piece, pieces, threads)) as found:
            for rows, (grey, faults) in found:
                self.grey += grey
                for kind, example in faults:
                    self.unusable[kind] += 1
                    if len(self.first[kind]) < _NAMED:
                        self.first[kind].append(example)
                if progress is not None:
                    progress(int(rows[-1]) + 1, self.count)

    def _piece(self, rows: np.ndarray, stopped: threading.Event) -> tuple[int, list[tuple[str, Example]]]:
        """Check some rows, in a thread: how many images are grey, and the samples that can't be used, by id."""
        ids = self.ids(rows)
        usable = self._source.labels(ids) != UNUSABLE
        faults = [self._table_fault(sample) for sample in ids[~usable].tolist()]
        grey = 0
        rows, ids = rows[usable], ids[usable]
        for row, sample, data in zip(rows.tolist(), ids.tolist(), self._encoded(ids), strict=True):
            if stopped.is_set():
                break
            if isinstance(data, DataError):
                faults.append(("record", Example(sample, str(data))))
                continue
            try:
                pixels = decode_pixels(data, max_pixels=self._max_pixels)
            except ImageError as error:
                faults.append((error.kind, Example(sample, f"{self._source.locate(sample)}: {error}")))
                continue
            self.sizes[row] = pixels.shape[1], pixels.shape[0]
            self.lengths[row] = data.size
            self.hashes[row] = _hash(data)
            grey += _is_grey(pixels)
        return grey, sorted(faults, key=lambda fault: fault[1].sample)

    def _table_fault(self, sample: int) -> tuple[str, Example]:
        """What was found wrong with a sample when the table was made."""
        fault = self._source.fault(sample)
        assert fault is not None
        return fault.kind, Example(sample, fault.reason)

    def _encoded(self, ids: np.ndarray) -> Iterator[np.ndarray | DataError]:
        """Encoded images of these samples, or why one can't be read."""
        try:
            yield from self._source.encoded(ids)
        except MachineError:
            raise
        except DataError:
            # One or more of the records; each is then read by itself.
            for row in range(len(ids)):
                try:
                    yield self._source.encoded(ids[row : row + 1])[0]
                except MachineError:
                    raise
                except DataError as error:
                    yield error


def _hash(data: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(data.data, digest_size=8).digest(), "little")


def _is_grey(pixels: np.ndarray) -> bool:
    """Whether red, green and blue are the same in each pixel of uint8 ``[H, W, 3]``."""
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    return bool((red == green).all()) and bool((green == blue).all())


def _class_figures(source: Archive | Sources) -> ClassFigures:
    labels = source.all_labels()
    usable = labels != UNUSABLE
    # Not a count for each of the C classes: a damaged label may have made that a huge number.
    present, samples = np.unique(labels if usable.all() else labels[usable], return_counts=True)
    edges = np.concatenate([[-1], present, [source.num_classes]])
    gaps = np.flatnonzero(np.diff(edges) > 1)
    ranges = [(int(edges[gap]) + 1, int(edges[gap + 1]) - 1) for gap in gaps[:_NAMED]]
    return ClassFigures(
        num_classes=source.num_classes,
        lowest=int(present[0]),
        highest=int(present[-1]),
        missing=source.num_classes - len(present),
        missing_ranges=ranges,
        single=int((samples == 1).sum()),
        samples=_spread(samples),
        histogram=_histogram(samples),
    )


def _histogram(values: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, to, how many) of integers from 1, in bins from one power to the next: of 2, or of 4, 8, ... if need be."""
    least, most, base = int(values.min()), int(values.max()), 2
    while base**_BINS <= most:
        base *= 2
    bins = [(base**power, base ** (power + 1) - 1) for power in range(_BINS)]
    found = [(a, b, int(((values >= a) & (values <= b)).sum())) for a, b in bins]
    return [(max(a, least), min(b, most), count) for a, b, count in found if a <= most and b >= least]


def _spread(values: np.ndarray) -> Spread:
    total = int(values.sum(dtype=np.int64))
    return Spread(int(values.min()), float(np.median(values)), total / values.size, int(values.max()), total)


def _image_figures(checked: _Checked, image_size: int | None) -> ImageFigures:
    usable = checked.lengths >= 0
    # A width and a height together as one number, to be sorted.
    packed, counts = np.unique(checked.sizes.view(np.uint64)[usable], return_counts=True)
    width, height = packed.view(np.uint32).reshape(-1, 2).T
    commonest = np.argsort(-counts, kind="stable")[:_SIZES]
    other = counts[(width != image_size) | (height != image_size)].sum() if image_size else None
    return ImageFigures(
        sizes=[(int(width[row]), int(height[row]), int(counts[row])) for row in commonest],
        distinct_sizes=len(packed),
        other_size=None if other is None else int(other),
        not_square=int(counts[width != height].sum()),
        grey=checked.grey,
        encoded_bytes=_spread(checked.lengths[usable]) if usable.any() else None,
    )


def _copies(source: Archive | Sources, checked: _Checked) -> Copies:
    """Groups of samples with the same bytes. That the hashes are equal isn't enough: the bytes are compared."""
    rows = np.flatnonzero(checked.lengths >= 0)
    rows = rows[np.argsort(checked.hashes[rows], kind="stable")]
    hashes = checked.hashes[rows]
    same = np.zeros(len(rows) + 1, dtype=bool)
    same[1:-1] = hashes[1:] == hashes[:-1]
    # A group begins before the first row that is the same as the one before it, and ends with the last.
    starts = np.flatnonzero(same[1:] & ~same[:-1])
    ends = np.flatnonzero(same[:-1] & ~same[1:]) + 1
    # In the order of the samples, not of the hashes.
    groups = np.argsort(rows[starts])
    within, across, across_samples = 0, 0, 0
    within_first: list[Pair] = []
    across_first: list[Pair] = []
    for start, end in zip(starts[groups], ends[groups], strict=True):
        ids = _same_bytes(source, checked.ids(rows[start:end]))
        labels = source.labels(ids)
        classes, earliest = np.unique(labels, return_index=True)
        within += len(ids) - len(classes)
        if len(ids) > len(classes) and len(within_first) < _NAMED:
            again = int(np.setdiff1d(np.arange(len(ids)), earliest)[0])
            before = int(np.flatnonzero(labels == labels[again])[0])
            within_first.append(_pair(source, ids, labels, before, again))
        if len(classes) > 1:
            across += 1
            across_samples += len(ids)
            if len(across_first) < _NAMED:
                across_first.append(_pair(source, ids, labels, 0, int(np.flatnonzero(labels != labels[0])[0])))
    return Copies(within, across, across_samples, within_first, across_first)


def _same_bytes(source: Archive | Sources, ids: np.ndarray) -> np.ndarray:
    """Those of the samples whose encoded image is that of the first."""
    image = source.encoded(ids[:1])[0]
    same = np.ones(len(ids), dtype=bool)
    # Their lengths are most likely the same, too.
    step = max(1, _COMPARED_BYTES // image.size)
    for begin in range(0, len(ids), step):
        for row, other in enumerate(source.encoded(ids[begin : begin + step]), start=begin):
            same[row] = np.array_equal(image, other)
    return ids[same]


def _pair(source: Archive | Sources, ids: np.ndarray, labels: np.ndarray, one: int, other: int) -> Pair:
    a, b = int(ids[one]), int(ids[other])
    return Pair((a, b), (int(labels[one]), int(labels[other])), (source.locate(a), source.locate(b)))


def _files_with_checksums(source: Archive | Sources) -> list[Path]:
    archives = [source] if isinstance(source, Archive) else source.archives
    return [path for archive in archives if archive.format == "tfrecord" for path in archive.files]


def _wrong_checksums(files: list[Path], progress: Progress | None) -> list[str]:
    """Where records of TFRecord files are whose checksum isn't that of their data."""
    total, before = sum(map(file_size, files)), 0
    found = []
    for path in files:

        def show(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        found += [f"{path}, byte {offset}" for offset in bad_checksums(path, show)]
        before += file_size(path)
    return found
