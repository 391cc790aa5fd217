"""The table of a data set: where each sample's encoded image lies, and its label. One form for all formats.

Row i is sample i: (file, offset, length, label). A scanner (``recordio``, ``tar``, ``tfrecord``, ``folder``) makes it
from the files once; ``archives`` caches it, and reads images by it without knowing what format they came from.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, overload

import numpy as np

from partial_fc.errors import DataError

# Called with what is done and the total, in bytes (of files) or, for an image folder, in classes.
Progress = Callable[[int, int], None]

# In the label column: the sample can't be used, and ``faults`` says why.
UNUSABLE = -1
# Labels are int64.
LARGEST_LABEL = (1 << 63) - 1
# In the length column: an image above this size is a fault of the scan, so lengths fit into int32.
MAX_IMAGE_BYTES = (1 << 31) - 1
# So many samples without a usable one: the data set isn't what it's taken for.
_FIRST = 100
# A set with more faults is of no use, and their list would take gigabytes.
_MOST_FAULTS = 1_000_000


class Fault(NamedTuple):
    """Why a sample can't be used.

    Attributes:
        kind: ``record`` (its framing is damaged, or the image isn't there), ``empty`` (the record is whole, but holds
            no byte of an image), ``label`` (it has no usable label).
        reason: in words, with the file and the byte offset.
    """

    kind: Literal["record", "empty", "label"]
    reason: str


@dataclass
class Scan:
    """What a scanner finds in the files of a data set.

    Attributes:
        file: int32 ``[N]``, index into the list of files that was scanned.
        offset: int64 ``[N]``, of the image's first byte in its file. Where ``length`` is negative: of the first byte of
            a RecordIO record in parts.
        length: int32 ``[N]``, of the image in bytes. Negative: the image is in a RecordIO record of several parts, that
            have to be joined (``recordio.joined_image``); its size is then not known.
        label: int64 ``[N]``, from 0; ``UNUSABLE`` where the sample can't be used.
        faults: by row, why a sample can't be used; one for each row whose label is ``UNUSABLE``.
        num_classes: C where the files themselves say it, else None (then it's the largest label + 1).
        class_names: C names, where the format has them (an image folder), else None.
    """

    file: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray
    faults: dict[int, Fault] = field(default_factory=dict)
    num_classes: int | None = None
    class_names: list[str] | None = None

    def __len__(self) -> int:
        """N, the number of samples."""
        return len(self.label)


class Names(Sequence[str]):
    """Many names in two arrays: ten million Python strings would take a gigabyte, and seconds to make.

    Args:
        text: the names one behind the other, encoded as the file system's, uint8 ``[bytes]``.
        ends: where each name ends in ``text``, ascending, int64 ``[n]``.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text = text
        self.ends = ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """The same names, packed."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)), dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        """The number of names."""
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """One name, or a list of those in a slice.

        Raises:
            IndexError: there is no such name.
        """
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"index {index} of {len(self)} names")
        first = int(self.ends[row - 1]) if row else 0
        return os.fsdecode(self.text[first : int(self.ends[row])].tobytes())


class TableBuilder:
    """Makes a table row by row, and gives up early on a data set that can't be what it's taken for.

    Args:
        advice: what the message then says at its end; called where none of the samples can be used.
    """

    def __init__(self, advice: Callable[[], str] = str) -> None:
        self._advice = advice
        self._columns = (array("i"), array("q"), array("i"), array("q"))
        self._faults: dict[int, Fault] = {}

    def __len__(self) -> int:
        """The number of rows so far."""
        return len(self._columns[3])

    def append(self, file: int, offset: int, length: int, label: int | Fault) -> None:
        """Add a sample.

        Args:
            file: index of its file.
            offset: of its image in bytes.
            length: of its image in bytes.
            label: its class, or why it can't be used.

        Raises:
            DataError: none of the first 100 samples can be used, or more than a million can't.
        """
        files, offsets, lengths, labels = self._columns
        if isinstance(label, Fault):
            self._faults[len(labels)] = label
            if len(self._faults) > _MOST_FAULTS:
                first = next(iter(self._faults.values())).reason
                raise DataError(f"more than {_MOST_FAULTS} samples can't be used; the first: {first}")
            label = UNUSABLE
        files.append(file)
        offsets.append(offset)
        lengths.append(length)
        labels.append(label)
        if len(labels) == _FIRST:
            self._check_usable()

    def scan(self) -> Scan:
        """The table of all samples, of which there has to be one; nothing can be added any more.

        Raises:
            DataError: none of the samples can be used.
        """
        self._check_usable()
        file, offset, length, label = self._columns
        return Scan(
            file=np.frombuffer(file, dtype=np.int32),
            offset=np.frombuffer(offset, dtype=np.int64),
            length=np.frombuffer(length, dtype=np.int32),
            label=np.frombuffer(label, dtype=np.int64),
            faults=self._faults,
        )

    def _check_usable(self) -> None:
        if len(self._faults) == len(self):
            reason = self._faults[0].reason
            raise DataError(f"none of the first {len(self)} samples can be used; the first: {reason}{self._advice()}")
