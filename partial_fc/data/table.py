"""The table of a data set: where each sample's encoded image lies, and its label. One form for all formats.

Row i is sample i: (file, offset, length, label). A scanner (``recordio``, ``tar``, ``tfrecord``, ``folder``) makes it
from the files once; ``archives`` caches it, and reads images by it without knowing what format they came from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

# Called with what is done and the total, in bytes (of files) or, for a folder, in files.
Progress = Callable[[int, int], None]

# In the label column: the sample can't be used, and ``faults`` says why.
UNUSABLE = -1
# In the length column: an image above this size is a fault of the scan, so lengths fit into int32.
MAX_IMAGE_BYTES = (1 << 31) - 1


class Fault(NamedTuple):
    """Why a sample can't be used.

    Attributes:
        kind: ``record`` (its framing is damaged, or the image isn't there), ``label`` (it has no usable label).
        reason: in words, with the file and the byte offset.
    """

    kind: Literal["record", "label"]
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
