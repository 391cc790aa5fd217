"""Writes RecordIO data sets as InsightFace's ``face2rec2.py`` does: ``train.rec``, ``train.idx`` and ``property``.

A record is ``uint32 0xced7230a, uint32 (cflag << 29 | length)``, the payload, and zeros up to 4 bytes. Its payload is
``uint32 flag, float32 label, uint64 id, uint64 id2``, then ``flag`` float32 labels where ``flag > 0``, then the image;
all little-endian. The keys of N images are 1..N, those of C identity records N+1..N+C, and key 0 is the header record.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType

from partial_fc.errors import DataError

_MAGIC = struct.pack("<I", 0xCED7230A)
# A length has 29 bits.
_MAX_PART = (1 << 29) - 1
# A label is a float32, exact up to here.
_MAX_LABEL = 1 << 24


def frame_record(payload: bytes) -> bytes:
    """Frame a payload as one RecordIO record.

    A reader that looks for the start of a record looks for the magic word at multiples of 4 bytes. So the payload is
    cut where it holds the word at such a place, and the word is left out: the parts have cflag 1 (the first), 2, and 3
    (the last), and a reader joins them with the word between. A whole record has cflag 0.

    Raises:
        DataError: the payload, or a part of it, has 2**29 bytes or more.
    """
    parts = []
    start = 0
    at = payload.find(_MAGIC)
    while at >= 0:
        if at % 4 == 0 and at + 4 <= len(payload):
            parts.append(payload[start:at])
            start = at + 4
            at = payload.find(_MAGIC, start)
        else:
            at = payload.find(_MAGIC, at + 1)
    parts.append(payload[start:])
    framed = []
    for number, part in enumerate(parts):
        if len(part) > _MAX_PART:
            raise DataError(
                f"a record of {len(payload)} bytes is too long for RecordIO: at most {_MAX_PART} can be had"
            )
        cflag = 0 if len(parts) == 1 else 1 if number == 0 else 3 if number == len(parts) - 1 else 2
        framed += [_MAGIC, struct.pack("<I", cflag << 29 | len(part)), part, b"\0" * (-len(part) % 4)]
    return b"".join(framed)


def commit_file(temporary: Path, final: Path) -> None:
    """Give a complete file its name, once its bytes are on the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)


class RecordWriter:
    """Writes one data set, an image at a time, class after class.

    The files have names that end in ``.partial`` until :meth:`close`; ``.idx``, without which nothing is a data set,
    gets its name last. As a context manager it closes after the block, or discards what it wrote if the block raised.

    Args:
        folder: where the files go; made if it isn't there. An older data set of the same name is replaced by
            :meth:`close`, and stays as it is until then.
        name: ``train`` gives ``train.rec`` and ``train.idx``.
        image_size: pixels of a side, for ``property``.
        scalar_labels: image records have flag 0 and a scalar label, and key 0 stands last in the file, as newer writers
            do; or else flag 2 and ``[class, 1.0]``, and key 0 stands between the images and the identity records.
    """

    def __init__(
        self, folder: str | Path, *, name: str = "train", image_size: int = 112, scalar_labels: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.name = name
        self.image_size = image_size
        self.scalar_labels = scalar_labels
        self._offsets: list[tuple[int, int]] = []
        # First image key of each class.
        self._first_keys: list[int] = []
        self._offset = 0
        self._closed = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._partial(f"{name}.rec"), "wb")
        except OSError as error:
            raise DataError(f"can't write a data set to {self.folder}: {error.strerror or error}") from error

    @property
    def num_images(self) -> int:
        """Images written so far."""
        return len(self._offsets)

    @property
    def num_classes(self) -> int:
        """Classes begun so far."""
        return len(self._first_keys)

    def write(self, image: bytes, label: int) -> int:
        """Append an encoded image, and return its key (1 for the first).

        Raises:
            DataError: the writer is closed, the image is empty, or ``label`` is neither the class of the image before
                nor the next one: classes are 0, 1, 2, ... and the images of one stand together.
        """
        self._check_open()
        if label not in (max(0, self.num_classes - 1), self.num_classes):
            expected = f"{self.num_classes - 1} or {self.num_classes}" if self.num_classes else "0"
            raise DataError(
                f"{self.folder / self.name}.rec: got label {label} for image {self.num_images + 1}, "
                f"expected {expected}: number the classes 0, 1, 2, ... and write the images of a class together"
            )
        if label > _MAX_LABEL:
            raise DataError(f"label {label} is beyond {_MAX_LABEL}, the last one that a float32 label holds exactly")
        if not image:
            raise DataError(f"image {self.num_images + 1}, of class {label}, has no bytes")
        key = self.num_images + 1
        framed = frame_record(self._image_header(key, label) + image)
        self._file.write(framed)
        if label == self.num_classes:
            self._first_keys.append(key)
        self._offsets.append((key, self._offset))
        self._offset += len(framed)
        return key

    def close(self) -> None:
        """Write the identity and header records, ``.idx`` and ``property``, and give the files their names.

        Raises:
            DataError: no image was written, or the writer is closed already.
        """
        self._check_open()
        if not self._offsets:
            self.discard()
            raise DataError(f"{self.folder}: no image was written, so there is no data set")
        past_images = self.num_images + 1
        ends = [*self._first_keys[1:], past_images]
        records = [
            (past_images + class_id, first, end)
            for class_id, (first, end) in enumerate(zip(self._first_keys, ends, strict=True))
        ]
        header = (0, past_images, past_images + self.num_classes)
        records.insert(len(records) if self.scalar_labels else 0, header)
        for key, first, end in records:
            framed = frame_record(struct.pack("<IfQQff", 2, 0.0, key, 0, first, end))
            self._file.write(framed)
            self._offsets.append((key, self._offset))
            self._offset += len(framed)
        self._file.close()
        self._closed = True
        lines = "".join(f"{key}\t{offset}\n" for key, offset in self._offsets)
        self._partial(f"{self.name}.idx").write_text(lines, encoding="ascii")
        side = self.image_size
        self._partial("property").write_text(f"{self.num_classes},{side},{side}\n", encoding="ascii")
        # An older .idx never stands beside the new .rec.
        (self.folder / f"{self.name}.idx").unlink(missing_ok=True)
        for file_name in (f"{self.name}.rec", "property", f"{self.name}.idx"):
            commit_file(self._partial(file_name), self.folder / file_name)

    def discard(self) -> None:
        """Remove what was written; a data set that was there before stays. Does nothing once the writer is closed."""
        if not self._closed:
            self._file.close()
            self._closed = True
            self._partial(f"{self.name}.rec").unlink(missing_ok=True)

    def __enter__(self) -> RecordWriter:
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the data set, or discard it if the block raised."""
        if kind is not None:
            self.discard()
        elif not self._closed:
            self.close()

    def _image_header(self, key: int, label: int) -> bytes:
        if self.scalar_labels:
            return struct.pack("<IfQQ", 0, label, key, 0)
        return struct.pack("<IfQQff", 2, 0.0, key, 0, label, 1.0)

    def _partial(self, file_name: str) -> Path:
        return self.folder / f"{file_name}.partial"

    def _check_open(self) -> None:
        if self._closed:
            raise DataError(f"{self.folder / self.name}.rec is closed: make a new RecordWriter")
