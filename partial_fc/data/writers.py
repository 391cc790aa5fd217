"""Writers of data sets: RecordIO as InsightFace's ``face2rec2.py`` and as MXNet write it, and WebDataset shards.

A RecordIO record is ``uint32 0xced7230a, uint32 (cflag << 29 | length)``, the payload, and zeros up to 4 bytes; a
payload is ``uint32 flag, float32 label, uint64 id, uint64 id2``, then ``flag`` float32 labels where ``flag > 0``, then
the image; all little-endian. In InsightFace's files the keys of N images are 1..N, those of C identity records
N+1..N+C, and key 0 is the header record. Plain MXNet files hold images only, at keys 0..N-1.

A WebDataset shard is a tar archive. The members of a sample stand together and have one name up to the first dot: here
``<sample>.jpg`` (or another format's ending), and ``<sample>.cls`` with the label in decimal digits.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from partial_fc.errors import DataError

_MAGIC = struct.pack("<I", 0xCED7230A)
# A length has 29 bits.
_MAX_PART = (1 << 29) - 1
# A label is a float32: the next integer is also what 2**24 + 1 is rounded to, and readers refuse it.
_MAX_LABEL = (1 << 24) - 1
# Bytes that a resumable writer holds back before they go to the file.
_BUFFER = 1 << 20
_BLOCK = 512
# The format's sum of a header counts its own eight bytes as blanks.
_CHECKSUM_BLANKS = 8 * 32
# What follows the sum in the header of an ordinary file: its type, no link, the magic, no owners, no device, no prefix.
_TAR_REST = b"0" + b"\0" * 100 + b"ustar\x0000" + b"\0" * 64 + b"0000000\0" * 2 + b"\0" * 167
_ENDINGS = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"BM", "bmp"), (b"P6", "ppm"))


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


def partial_name(file_name: str) -> str:
    """What a file is called until it is complete."""
    return f"{file_name}.partial"


def image_ending(image: bytes) -> str | None:
    """The ending of an encoded image's file name, by its first bytes; None if WebDataset readers have none for it."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((ending for magic, ending in _ENDINGS if image.startswith(magic)), None)


def tar_header(name: str, size: int) -> bytes:
    """The header of a file in a tar archive: 512 bytes, POSIX ustar, mode 0644, no owner and no time.

    The same on any machine, in any year; Python's ``tarfile`` differs between its releases in fields that nobody reads.

    Args:
        name: ASCII, at most 100 characters.
        size: of the file, below 8 GiB.
    """
    field = (
        name.encode("ascii").ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"0" * 11 + b"\0"
    )
    checksum = sum(field) + _CHECKSUM_BLANKS + sum(_TAR_REST)
    return b"".join((field, b"%06o\0 " % checksum, _TAR_REST))


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
            raise DataError(f"label {label} is beyond {_MAX_LABEL}, the last one that a float32 tells from all others")
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
        return self.folder / partial_name(file_name)

    def _check_open(self) -> None:
        if self._closed:
            raise DataError(f"{self.folder / self.name}.rec is closed: make a new RecordWriter")


class _GrowingFile:
    """A file that is written in order, and can be gone on with from a length that was once brought to the disk."""

    def __init__(self, path: Path, length: int = 0) -> None:
        self.path = path
        self.length = length
        self._file = open(path, "r+b" if length else "wb", buffering=_BUFFER)
        if length:
            if (size := os.fstat(self._file.fileno()).st_size) < length:
                self._file.close()
                raise DataError(f"{path}: {size} bytes, expected the {length} that were written")
            self._file.truncate(length)
            self._file.seek(length)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.length += len(data)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class PlainRecordWriter:
    """Writes plain MXNet RecordIO, in steps that survive the process: keys from 0, flag 0, one float32 label an image.

    There is no header record and there are no identity records, so that DALI's ``fn.readers.mxnet``, which takes every
    key for an image, can read it. The labels may come in any order and have gaps. The files keep names that end in
    ``.partial``: whoever is told by :meth:`finish` that they are complete, renames them, the ``.idx`` last.

    Args:
        folder: where the files go; it has to be there.
        name: ``train`` gives ``train.rec`` and ``train.idx``.
        state: what :meth:`sync` returned; the files are cut to the length that they had then. None begins anew.

    Raises:
        DataError: the files are shorter than ``state`` says.
        OSError: they can't be opened; here and in the methods.
    """

    def __init__(self, folder: Path, *, name: str = "train", state: Mapping[str, int] | None = None) -> None:
        state = state or {"images": 0, "rec": 0, "idx": 0}
        self._images = state["images"]
        self._names = [f"{name}.rec", f"{name}.idx"]
        self._rec = _GrowingFile(folder / partial_name(self._names[0]), state["rec"])
        self._idx = _GrowingFile(folder / partial_name(self._names[1]), state["idx"])

    @property
    def written(self) -> int:
        """Bytes written so far."""
        return self._rec.length + self._idx.length

    def write(self, sample: int, image: bytes, label: int) -> None:
        """Append an encoded image; ``sample`` isn't used, its key is the next one.

        Raises:
            DataError: the label is not in ``[0, 2**24)``, which a float32 tells apart; or the image is too long.
        """
        if not 0 <= label <= _MAX_LABEL:
            raise DataError(
                f"sample {sample}: label {label}, expected one from 0 to {_MAX_LABEL}, which a float32 tells apart: "
                "write WebDataset shards instead"
            )
        key = self._images
        self._idx.write(b"%d\t%d\n" % (key, self._rec.length))
        self._rec.write(frame_record(struct.pack("<IfQQ", 0, label, key, 0) + image))
        self._images += 1

    def state(self) -> dict[str, int]:
        """Where the files end now, to go on from; it counts once a later :meth:`sync` has come back."""
        return {"images": self._images, "rec": self._rec.length, "idx": self._idx.length}

    def sync(self) -> dict[str, int]:
        """Bring what was written to the disk, and return the state to go on from."""
        self._rec.sync()
        self._idx.sync()
        return self.state()

    def finish(self) -> dict[str, int]:
        """Complete the files; returns the state, as :meth:`sync` does."""
        return self.sync()

    def names(self) -> list[str]:
        """Final names of the files, in the order in which they have to get them."""
        return self._names

    def close(self) -> None:
        """Close the files, complete or not."""
        self._rec.close()
        self._idx.close()


class ShardWriter:
    """Writes WebDataset shards ``train-000000.tar``, ..., in steps that survive the process.

    Members are ``<sample>.<ending>`` and ``<sample>.cls``, the sample in nine digits, with no owner and no time: the
    bytes depend on nothing but the samples. The files keep names that end in ``.partial``, as those of
    :class:`PlainRecordWriter` do.

    Args:
        folder: where the files go; it has to be there.
        name: what the shards' names begin with.
        shard_size: samples of a shard.
        state: what :meth:`sync` returned. None begins anew.

    Raises:
        DataError: the files are not those that ``state`` speaks of.
        OSError: they can't be opened; here and in the methods.
    """

    def __init__(
        self, folder: Path, *, name: str = "train", shard_size: int = 10_000, state: Mapping[str, int] | None = None
    ) -> None:
        state = state or {"shards": 0, "complete_bytes": 0, "open_samples": 0, "open_bytes": 0}
        self._folder = folder
        self._name = name
        self._shard_size = shard_size
        self._shards = state["shards"]
        self._complete_bytes = state["complete_bytes"]
        self._open_samples = state["open_samples"]
        there = [folder / partial_name(self._shard_name(shard)) for shard in range(self._shards)]
        size = sum(path.stat().st_size for path in there if path.exists())
        if size != self._complete_bytes:
            raise DataError(f"{folder}: {self._shards} shards of {size} bytes, expected {self._complete_bytes}")
        self._file: _GrowingFile | None = None
        if self._open_samples:
            self._file = self._open(state["open_bytes"])

    @property
    def written(self) -> int:
        """Bytes written so far."""
        return self._complete_bytes + (self._file.length if self._file else 0)

    def write(self, sample: int, image: bytes, label: int) -> None:
        """Append the two members of a sample.

        Raises:
            DataError: the image has a format without an :func:`image_ending`.
        """
        if (ending := image_ending(image)) is None:
            raise DataError(
                f"sample {sample}: an image that begins with {image[:8]!r} has no place in a shard: encode it"
            )
        if self._file is None:
            self._file = self._open(0)
        for member, data in ((f"{sample:09d}.{ending}", image), (f"{sample:09d}.cls", b"%d" % label)):
            self._file.write(b"".join((tar_header(member, len(data)), data, bytes(-len(data) % _BLOCK))))
        self._open_samples += 1
        if self._open_samples == self._shard_size:
            self._end_shard()

    def state(self) -> dict[str, int]:
        """Where the files end now, to go on from; it counts once a later :meth:`sync` has come back."""
        return {
            "shards": self._shards,
            "complete_bytes": self._complete_bytes,
            "open_samples": self._open_samples,
            "open_bytes": self._file.length if self._file else 0,
        }

    def sync(self) -> dict[str, int]:
        """Bring what was written to the disk, and return the state to go on from."""
        if self._file is not None:
            self._file.sync()
        return self.state()

    def finish(self) -> dict[str, int]:
        """Complete the last shard; returns the state, as :meth:`sync` does."""
        if self._file is not None:
            self._end_shard()
        return self.sync()

    def names(self) -> list[str]:
        """Final names of the complete shards."""
        return [self._shard_name(shard) for shard in range(self._shards)]

    def close(self) -> None:
        """Close the last shard, complete or not."""
        if self._file is not None:
            self._file.close()

    def _shard_name(self, shard: int) -> str:
        return f"{self._name}-{shard:06d}.tar"

    def _open(self, length: int) -> _GrowingFile:
        return _GrowingFile(self._folder / partial_name(self._shard_name(self._shards)), length)

    def _end_shard(self) -> None:
        assert self._file is not None
        # Two empty blocks end an archive, and it is a multiple of 20 blocks long.
        end = self._file.length + 2 * _BLOCK
        self._file.write(bytes(2 * _BLOCK + -end % (20 * _BLOCK)))
        self._file.sync()
        self._file.close()
        self._complete_bytes += self._file.length
        self._shards += 1
        self._open_samples = 0
        self._file = None
