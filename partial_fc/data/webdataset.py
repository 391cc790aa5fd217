"""WebDataset's convention: how the members of an archive are samples.

A sample is the members one behind the other that have the same path up to the first dot of the base name:
``a/0001.jpg`` and ``a/0001.cls``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from partial_fc.data.table import LARGEST_LABEL, MAX_IMAGE_BYTES, UNUSABLE, Fault, Scan, TableBuilder
from partial_fc.errors import DataError

# A regular file of an archive: its name, where its data starts, and its size in bytes.
Member = tuple[bytes, int, int]

_IMAGE, _TEXT, _JSON = 1, 2, 3
_ROLES = {
    b"jpg": _IMAGE,
    b"jpeg": _IMAGE,
    b"png": _IMAGE,
    b"webp": _IMAGE,
    b"bmp": _IMAGE,
    b"ppm": _IMAGE,
    b"cls": _TEXT,
    b"json": _JSON,
}
_EXPECTED = (
    "expected an image (.jpg, .jpeg, .png, .webp, .bmp, .ppm) and beside it a .cls with an integer, or a .json with "
    "'label', 'cls' or 'class'"
)
_JSON_KEYS = ("label", "cls", "class")
_MAX_TEXT = 64
_MAX_JSON = 1 << 20
# Files about the data set, as the webdataset package has them: no samples.
_META = re.compile(rb"__[^/]*__(?:$|/)")


class Samples:
    """Members become samples, samples become rows of the table.

    The image of a sample is its member ``.jpg``, ``.jpeg``, ``.png``, ``.webp``, ``.bmp`` or ``.ppm``; of several the
    one with nothing else behind the first dot of its name. The label is the decimal integer in its ``.cls``; without
    one ``label``, ``cls`` or ``class`` of its ``.json``. Groups with neither are left out, as are members called
    ``__...__``.

    Args:
        paths: the archives.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._file = 0
        self._view = memoryview(b"")
        self._seen: list[str] = []
        self._table = TableBuilder(partial(_advice, self._seen))
        # The sample whose members are being gathered.
        self._key = b""
        self._images: list[Member] = []
        self._labels: list[tuple[int, Member]] = []

    def open(self, file: int, view: memoryview) -> None:
        """Go on with another archive, and its first sample.

        Args:
            file: index into the archives.
            view: the archive's bytes.
        """
        self._file, self._view, self._key = file, view, b""

    def add(self, members: list[Member]) -> None:
        """Take members in the order of the archive.

        Raises:
            DataError: none of the first 100 samples can be used, or more than a million can't.
        """
        if len(self._seen) < 8:
            self._seen += [_text(name) for name, _, _ in members[:8]]
        for member in members:
            name = member[0]
            slash = name.rfind(b"/") + 1
            dot = name.find(b".", slash)
            if dot <= slash or (name.startswith(b"__") and _META.match(name)):
                continue  # no extension, a hidden file, or about the data set
            if name[:dot] != self._key:
                self.close_sample()
                self._key = name[:dot]
            role = _ROLES.get(name[name.rfind(b".") + 1 :].lower())
            if role == _IMAGE:
                self._images.append(member)
            elif role:
                self._labels.append((role, member))

    def close_sample(self) -> None:
        """Make a row of the members gathered since the last one.

        Raises:
            DataError: none of the first 100 samples can be used, or more than a million can't.
        """
        images, labels = self._images, self._labels
        if not images and not labels:
            return
        self._images, self._labels = [], []
        image = self._only(images)
        label, reason = self._label(labels)
        if not images and label is None:
            return  # about something else
        first = image or (images[0] if images else labels[0][1])
        row: int | Fault
        if image is None:
            count = f"{len(images)} images, and their names don't say which is meant" if images else "no image"
            row = Fault("record", f"{self._where(first)}: the sample has {count}: {_EXPECTED}")
        elif image[2] > MAX_IMAGE_BYTES:
            row = Fault("record", f"{self._where(image)}: {image[2]} bytes, expected at most {MAX_IMAGE_BYTES}")
        elif reason:
            row = Fault("label", reason)
        elif label is None:
            row = Fault("label", f"{self._where(image)}: no label: {_EXPECTED}")
        else:
            row = label
        length = 0 if isinstance(row, Fault) and row.kind == "record" else first[2]
        self._table.append(self._file, first[1], length, row)

    def _only(self, members: list[Member]) -> Member | None:
        """The one member, or the one with a plain name: ``key.jpg`` beside ``key.mask.png``. Else None."""
        if len(members) == 1:
            return members[0]
        plain = [member for member in members if member[0].rfind(b".") == len(self._key)]
        return plain[0] if len(plain) == 1 else None

    def _label(self, members: list[tuple[int, Member]]) -> tuple[int | None, str]:
        """A sample's label, None where it has none; and what is wrong with it, empty where nothing is."""
        texts = [member for role, member in members if role == _TEXT]
        text = self._only(texts)
        if texts and text is None:
            return UNUSABLE, f"{self._where(texts[1])}: a second label of the sample, expected one"
        for role, member in members if text is None else [(_TEXT, text)]:
            _, start, length = member
            most = _MAX_TEXT if role == _TEXT else _MAX_JSON
            if length > most:
                return UNUSABLE, f"{self._where(member)}: {length} bytes of label, expected at most {most}"
            value: Any = bytes(self._view[start : start + length])
            if role == _JSON:
                try:
                    content = json.loads(value)
                except (ValueError, RecursionError) as error:
                    return UNUSABLE, f"{self._where(member)}: can't be read as JSON ({error})"
                key = next((key for key in _JSON_KEYS if key in content), None) if isinstance(content, dict) else None
                if key is None:
                    continue
                value = content[key]
            label = _integer(value)
            if label is not None:
                return label, ""
            got = f"{value!r:.60}" if isinstance(value, (bytes, str, int, float)) else f"a {type(value).__name__}"
            return UNUSABLE, f"{self._where(member)}: the label is {got}, expected an integer from 0 to 2**63 - 1"
        return None, ""

    def _where(self, member: Member) -> str:
        return f"{self._paths[self._file]}: byte {member[1]}: {_text(member[0])}"

    def scan(self) -> Scan:
        """The table of all samples.

        Raises:
            DataError: there is none, or none can be used.
        """
        if not len(self._table):
            where = self._paths[0] if self._paths else "no archive"
            raise DataError(
                f"{where}: no sample in {len(self._paths)} archives, whose first members are "
                f"{', '.join(self._seen) or 'not there'}: {_EXPECTED}"
            )
        return self._table.scan()


def _advice(members: list[str]) -> str:
    return f"; the first members are {', '.join(members)}: write the label beside each image, or set data.format"


def _integer(value: Any) -> int | None:
    """A label as an integer of JSON, or as decimal digits; None where it's neither, or is out of range."""
    if isinstance(value, str):
        value = value.encode("utf-8", "replace")
    if isinstance(value, bytes):
        digits = value.strip()
        value = int(digits) if digits.isdigit() and len(digits) <= _MAX_TEXT else None
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        value = int(value)
    usable = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_LABEL
    return value if usable else None


def _text(name: bytes) -> str:
    return repr(name.decode("utf-8", "replace")[:200])
