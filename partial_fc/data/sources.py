"""Several archives as one data set: the ids of the samples are put one behind the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from partial_fc.data.archives import Archive
from partial_fc.data.table import UNUSABLE, Fault
from partial_fc.errors import ConfigError

# The centres of so many, 512 bfloat16 each, take a PiB: a label beyond is damage.
_MOST_CLASSES = 1 << 40


class Sources:
    """Archives read as one, with an archive's interface; sample ids 0..N-1 run through them in the order given.

    Args:
        archives: one or more.
        merge_classes: False: the class ids of an archive are shifted by the class counts of those before it, so that
            no class is in two archives. True: the same id is the same class in all archives.

    Attributes:
        archives: as given.
        sizes: the number of samples of each.
        num_classes: C: the sum of the archives' class counts; where classes are merged, the largest of them.
        path: what messages name, and no place to read from: ``/data/a/train.rec``, of several ``/data/a and 2 more``.
        class_names: C names, where all archives have them and none of them is merged with another; else None.

    Raises:
        ConfigError: no archive is given, or C is more than 2**40.
    """

    def __init__(self, archives: Sequence[Archive], *, merge_classes: bool = False) -> None:
        if not archives:
            raise ConfigError("no data set is given, expected one archive or more")
        self.archives = list(archives)
        self.sizes = [len(archive) for archive in archives]
        self._ends = np.cumsum(self.sizes)
        counts = [archive.num_classes for archive in archives]
        self.num_classes = max(counts) if merge_classes else sum(counts)
        if self.num_classes > _MOST_CLASSES:
            raise self._too_many(self.archives[counts.index(max(counts))])
        self._shifts = [0] * len(counts) if merge_classes else [sum(counts[:i]) for i in range(len(counts))]
        first, others = self.archives[0], len(counts) - 1
        self.path = Path(f"{first.path} and {others} more") if others else first.path
        self.class_names = _joined_names(self.archives, merged=merge_classes)

    def __len__(self) -> int:
        """N, the number of samples of all archives together, those that can't be used among them."""
        return int(self._ends[-1])

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Classes of these samples, int64 ``[n]``; ``UNUSABLE`` where a sample can't be used.

        Raises:
            IndexError: an id is out of range.
        """
        labels = np.empty(len(ids), dtype=np.int64)
        for number, rows, own in self._split(ids):
            labels[rows] = _shifted(self.archives[number].labels(own), self._shifts[number])
        return labels

    def all_labels(self) -> np.ndarray:
        """Classes of all samples, int64 ``[N]``, ``UNUSABLE`` where a sample can't be used; maybe memory-mapped."""
        parts = [
            _shifted(archive.all_labels(), shift) for archive, shift in zip(self.archives, self._shifts, strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """Sizes of the encoded images in bytes, int64 ``[n]``; -1 where not known.

        Raises:
            IndexError: an id is out of range.
        """
        lengths = np.empty(len(ids), dtype=np.int64)
        for number, rows, own in self._split(ids):
            lengths[rows] = self.archives[number].lengths(own)
        return lengths

    def encoded(self, ids: np.ndarray) -> list[np.ndarray]:
        """Encoded images of these samples, uint8 each: see ``Archive.encoded``.

        Raises:
            DataError: an image can't be read.
            IndexError: an id is out of range.
        """
        if len(self.archives) == 1:
            return self.archives[0].encoded(ids)
        images: dict[int, np.ndarray] = {}
        for number, rows, own in self._split(ids):
            images.update(zip(rows.tolist(), self.archives[number].encoded(own), strict=True))
        return [images[row] for row in range(len(ids))]

    def fault(self, sample: int) -> Fault | None:
        """Why a sample can't be used, with the file's path; None where it can.

        Raises:
            IndexError: the id is out of range.
        """
        archive, own = self._find(sample)
        return archive.fault(own)

    def locate(self, sample: int) -> str:
        """Where a sample is, for messages: see ``Archive.locate``.

        Raises:
            IndexError: the id is out of range.
        """
        archive, own = self._find(sample)
        return archive.locate(own)

    def _too_many(self, archive: Archive) -> ConfigError:
        """What to raise where there are too many classes, most of them in this archive."""
        labels = archive.all_labels()
        sample = int(np.argmax(labels))
        if archive.num_classes == int(labels[sample]) + 1:
            what = f"sample {sample} ({archive.locate(sample)}) has the label {labels[sample]}"
            advice = "correct the label, or leave this sample out"
        else:
            what = f"{archive.path} has {archive.num_classes} classes"
            advice = "correct num_classes of this data set"
        return ConfigError(
            f"{what}, so that there are {self.num_classes} classes in all, expected at most 2**40: {advice}"
        )

    def _find(self, sample: int) -> tuple[Archive, int]:
        """The archive of a sample, and the sample's id there."""
        ((number, _, own),) = self._split(np.array([sample], dtype=np.int64))
        return self.archives[number], int(own[0])

    def _split(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of each archive that occurs: its number, the rows of ``ids`` that are its samples, and their ids there."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"sample ids must be in [0, {len(self)}), got {ids.min()} to {ids.max()}")
        owner = np.searchsorted(self._ends, ids, side="right")
        for number in np.unique(owner).tolist():
            rows = np.flatnonzero(owner == number)
            yield number, rows, ids[rows] - (self._ends[number] - self.sizes[number])


class _JoinedNames(Sequence[str]):
    """Lists of names one behind the other, none of which is read before it's asked for."""

    def __init__(self, lists: list[Sequence[str]]) -> None:
        self._lists = lists
        self._ends = np.cumsum([len(names) for names in lists]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"index {index} of {len(self)} names")
        number = bisect_right(self._ends, row)
        return self._lists[number][row - self._ends[number]]


def _joined_names(archives: list[Archive], merged: bool) -> Sequence[str] | None:
    """Names of all classes; None where an archive has none, or not one for each class."""
    lists = [archive.class_names for archive in archives]
    if len(lists) == 1:
        return lists[0]
    named = [
        names
        for names, archive in zip(lists, archives, strict=True)
        if names is not None and len(names) == archive.num_classes
    ]
    return None if merged or len(named) < len(lists) else _JoinedNames(named)


def _shifted(labels: np.ndarray, shift: int) -> np.ndarray:
    return labels if shift == 0 else np.where(labels == UNUSABLE, UNUSABLE, labels + shift)
