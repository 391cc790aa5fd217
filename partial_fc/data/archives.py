"""A data set of any format, opened as one table of (encoded image, label) by sample id, which is made once and kept."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from partial_fc.data.files import FORMATS, MappedFiles, find_files, unreadable
from partial_fc.data.kept import kept_table
from partial_fc.data.recordio import joined_image
from partial_fc.data.table import UNUSABLE, Fault, Progress, Scan
from partial_fc.errors import ConfigError, DataError

logger = logging.getLogger("partial_fc.data")

# Bytes of a page of memory; where they are larger this does no harm.
_PAGE = 4096
# Images read at once where views of all would hold too many files mapped: each thread then holds at most so many.
_FEW = 8
# More classes a sample than this come of a label that is no class, or of classes that aren't numbered one by one.
_MOST_CLASSES_A_SAMPLE = 1000


class Archive:
    """Samples 0..N-1 of one data set: where their encoded images are, and their labels. ``open_archive`` makes it.

    Only what is asked for is read. For several threads at once.

    Args:
        format: ``recordio``, ``folder``, ``webdataset`` or ``tfrecord``.
        files: the files that the table's column ``file`` counts through.
        table: one row a sample.
        num_classes: C.
        class_names: C names, where the format has them.

    Attributes:
        path: what messages name: the file where there is one, else the folder that the files are in.
        format, num_classes, class_names: as given.
    """

    def __init__(
        self, format: str, files: MappedFiles, table: Scan, num_classes: int, class_names: Sequence[str] | None = None
    ) -> None:
        self.format = format
        self.num_classes = num_classes
        self.class_names = class_names
        self.path = files.path(0) if len(files) == 1 and format != "folder" else files.root
        self._files = files
        self._table = table

    @property
    def root(self) -> Path:
        """The folder that the names of the files are relative to."""
        return self._files.root

    @property
    def files(self) -> list[Path]:
        """The files that hold the images, sorted; of an image folder each image is one."""
        return [self.root / name for name in self._files.names]

    def __len__(self) -> int:
        """N, the number of samples, those that can't be used among them."""
        return len(self._table)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Classes of these samples: of int64 ids ``[n]`` int64 ``[n]``, ``UNUSABLE`` where a sample can't be used.

        Raises:
            IndexError: an id is out of range.
        """
        self._check(ids)
        return self._table.label[ids]

    def all_labels(self) -> np.ndarray:
        """Classes of all samples, int64 ``[N]``, ``UNUSABLE`` where a sample can't be used; read-only, maybe mapped."""
        return self._table.label

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """Sizes of the encoded images in bytes: of int64 ids ``[n]`` int64 ``[n]``; -1 where not known.

        Raises:
            IndexError: an id is out of range.
        """
        self._check(ids)
        lengths = self._table.length[ids]
        return np.where(lengths > 0, lengths, -1).astype(np.int64)

    def encoded(self, ids: np.ndarray) -> list[np.ndarray]:
        """Encoded images of these samples, those with a fault of their label among them.

        Args:
            ids: int64 ``[n]``, values in ``[0, N)``.

        Returns:
            n uint8 arrays: read-only views of the mapped files. Copies where views would hold too many files open,
            where a record's parts had to be joined, and of the files of an image folder.

        Raises:
            MachineError: the process has too many files open, or too little memory.
            DataError: there is no image, or it can't be read any more.
            IndexError: an id is out of range.
        """
        self._check(ids)
        for row in np.flatnonzero(self._table.label[ids] == UNUSABLE).tolist():
            fault = self._table.faults[int(ids[row])]
            if fault.kind != "label":
                raise DataError(f"sample {ids[row]} can't be used: {fault.reason}")
        if self.format == "folder":
            return [_read_file(self._files.path(file)) for file in self._table.file[ids].tolist()]
        if not self._files.mappings.crowded(self._files):
            return self._images(ids)
        images: list[np.ndarray] = []
        for at in range(0, len(ids), _FEW):
            images += [image.copy() for image in self._images(ids[at : at + _FEW])]
        return images

    def _images(self, ids: np.ndarray) -> list[np.ndarray]:
        """Encoded images of these samples: views of the mapped files, but of records in parts."""
        if len(self._files) == 1:
            files, place = np.zeros(1, dtype=np.int64), np.zeros(len(ids), dtype=np.int64)
        else:
            files, place = np.unique(self._table.file[ids], return_inverse=True)
        data = [self._files.bytes(file) for file in files.tolist()]
        size = np.array([array.size for array in data], dtype=np.int64)[place]
        offset, length = self._table.offset[ids], self._table.length[ids].astype(np.int64)
        end = offset + np.abs(length)
        outside = (offset < 0) | (end > size)
        if outside.any():
            row = int(np.argmax(outside))
            raise DataError(
                f"{self._path_of(ids[row])}: sample {ids[row]}, bytes {offset[row]} to {end[row]}, but the file has "
                f"{size[row]}: it was changed since the data set was opened; start again"
            )
        for file, array in enumerate(data):
            _read_in(array, offset[place == file], end[place == file])
        where = zip(place.tolist(), offset.tolist(), end.tolist(), strict=True)
        images = [data[file][first:last] for file, first, last in where]
        for row in np.flatnonzero(length < 0).tolist():
            name = f"{self._path_of(ids[row])}: sample {ids[row]} at byte {offset[row]}"
            images[row] = joined_image(data[place[row]], int(offset[row]), -int(length[row]), name)
        return images

    def _path_of(self, sample: int) -> Path:
        return self._files.path(int(self._table.file[sample]))

    def fault(self, sample: int) -> Fault | None:
        """Why this sample can't be used; None where it can.

        Raises:
            IndexError: the id is out of range.
        """
        self._check(np.array([sample]))
        return self._table.faults.get(sample)

    def locate(self, sample: int) -> str:
        """Where this sample's image is, for messages: ``/data/train.rec, byte 1234``, or the path of its file.

        Raises:
            IndexError: the id is out of range.
        """
        self._check(np.array([sample]))
        path = str(self._path_of(sample))
        return path if self.format == "folder" else f"{path}, byte {int(self._table.offset[sample])}"

    def _check(self, ids: np.ndarray) -> None:
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"sample ids must be in [0, {len(self)}), got {ids.min()} to {ids.max()}")


def open_archive(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    num_classes: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    progress: Progress | None = None,
) -> Archive:
    """Open a data set. At the first time its files are scanned; the table is then kept, and read at once.

    The table is kept in the folder ``.partial_fc`` beside the data, so that whoever copies the data copies it, too, and
    is made anew once a file has another size or time of change, or files have come or gone. Of an image folder only the
    times of its folders are compared, since asking for those of ten million files takes minutes: an image that is
    overwritten in place is read as it is now, and a file that is gone is an error when it's read.

    Args:
        path: see ``files.find_files``.
        format: ``recordio``, ``folder``, ``webdataset`` or ``tfrecord``; ``auto``: told from the names.
        num_classes: C; None: what the files say, else the largest label + 1.
        cache: folder to keep the table in, where it shall not be beside the data; tables of any data sets may share it.
            ``~`` at its beginning is the home folder.
        image_key: of TFRecord, see ``scan_tfrecords``; None: one of the usual names.
        label_key: likewise.
        progress: called with what is done and the total while files are scanned.

    Raises:
        ConfigError: an argument is wrong or doesn't fit the files, or a label is not below ``num_classes``.
        DataError: the files can't be used.
    """
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"data.format: got {format!r}, expected auto or one of {', '.join(FORMATS)}")
    if num_classes is not None and num_classes < 1:
        raise ConfigError(f"data.num_classes: got {num_classes}, expected 1 or more")
    found = find_files(path, format)
    if found.format != "tfrecord" and (image_key or label_key):
        raise ConfigError(f"data.image_key, data.label_key: they are for TFRecord, but {path} is {found.format}")
    table = kept_table(found, {"image_key": image_key, "label_key": label_key}, cache, progress)
    files = MappedFiles(found.root, table.names)
    archive = Archive(found.format, files, table.scan, 0, table.class_names)
    archive.num_classes = _number_of_classes(archive, table.scan.num_classes, num_classes)
    return archive


def _number_of_classes(archive: Archive, declared: int | None, given: int | None) -> int:
    labels = archive.all_labels()
    largest = int(labels.max(initial=UNUSABLE))
    if largest < 0:
        reason = f"; the first: {fault.reason}" if len(labels) and (fault := archive.fault(0)) else ""
        raise DataError(f"{archive.path}: none of its {len(labels)} samples can be used{reason}")
    if given is not None and largest >= given:
        sample = int(np.argmax(labels >= given))
        raise ConfigError(
            f"data.num_classes: got {given}, but sample {sample} ({archive.locate(sample)}) has the label "
            f"{labels[sample]}: expected at least {largest + 1}"
        )
    if not (given or declared) and largest >= _MOST_CLASSES_A_SAMPLE * len(labels):
        sample = int(np.argmax(labels))
        logger.warning(
            "%s: %d classes for %d samples, since sample %d (%s) has the label %d: correct it, or number the classes "
            "from 0 on",
            archive.path,
            largest + 1,
            len(labels),
            sample,
            archive.locate(sample),
            largest,
        )
    return given or declared or largest + 1


def _read_in(data: np.ndarray, offset: np.ndarray, end: np.ndarray) -> None:
    """Touch the pages of these images in one call, so that the interpreter doesn't stand still where a disk is slow."""
    pages = np.arange(0, int((end - offset).max(initial=0)) + _PAGE, _PAGE)
    data.take(np.minimum(offset[:, None] + pages, np.maximum(end - 1, offset)[:, None]), mode="clip")


def _read_file(path: Path) -> np.ndarray:
    """A whole file, read-only uint8 ``[size]``."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            data = os.read(descriptor, size)
            while len(data) < size and (more := os.read(descriptor, size - len(data))):
                data += more
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(path, "the image", error, "copy it again, or take it away") from error
    except ValueError as error:  # what no file can be called, out of a damaged table
        raise DataError(f"{path}: can't read the image ({error}): copy it again, or take it away") from error
    return np.frombuffer(data, dtype=np.uint8)
