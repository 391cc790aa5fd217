"""RecordIO files for tests, written from the format's description; never imports partial_fc."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

MAGIC = 0xCED7230A
WORD = struct.pack("<I", MAGIC)
# The magic word at a multiple of 4 bytes splits a record; at 2 it doesn't. Lengths that need and don't need padding.
SPLIT_IMAGES = [
    b"first",
    b"abcd" + WORD + b"efgh",
    b"xy" + WORD + b"z",
    WORD,
    b"mn12" + WORD + WORD + b"end",
    b"12345678",
]
SPLIT_LABELS = [0, 0, 1, 1, 2, 2]
OMNIGLOT = Path(__file__).parents[1] / ".." / "shared" / "data" / "omniglot"


def frame(payload: bytes, cflag: int = 0) -> bytes:
    """One record, or one part of a record."""
    return struct.pack("<II", MAGIC, cflag << 29 | len(payload)) + payload + b"\0" * (-len(payload) % 4)


def split(payload: bytes) -> bytes:
    """A record cut at each magic word that stands at a multiple of 4 bytes, without that word."""
    parts, start = [], 0
    for at in range(0, len(payload) - 3, 4):
        if payload[at : at + 4] == struct.pack("<I", MAGIC):
            parts.append(payload[start:at])
            start = at + 4
    parts.append(payload[start:])
    flags = [1] + [2] * (len(parts) - 2) + [3] if len(parts) > 1 else [0]
    return b"".join(frame(part, flag) for part, flag in zip(parts, flags, strict=True))


def payload(key: int, label: float | list[float], image: bytes) -> bytes:
    """Header and image: a list of labels has a flag, a single label has none."""
    if isinstance(label, list):
        return struct.pack("<IfQQ", len(label), 0, key, 0) + struct.pack(f"<{len(label)}f", *label) + image
    return struct.pack("<IfQQ", 0, label, key, 0) + image


def write(folder: Path, records: list[tuple[int, bytes]], classes: int | None = None) -> Path:
    """Write framed records ``(key, bytes)`` in this order, with their index and, with ``classes``, a property file."""
    data, lines = b"", []
    for key, record in records:
        lines.append(f"{key}\t{len(data)}\n")
        data += record
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.rec").write_bytes(data)
    (folder / "train.idx").write_text("".join(lines))
    if classes is not None:
        (folder / "property").write_text(f"{classes},112,112\n")
    return folder


def write_old(folder: Path, images: list[bytes], labels: list[int], classes: int | None = None) -> Path:
    """As the older InsightFace writer: images at keys 1..N, then key 0, then the identities; two labels an image."""
    count, identities = len(images), max(labels) + 1
    records = [
        (i + 1, split(payload(i + 1, [float(label), 1.0], image)))
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    records.append((0, split(payload(0, [count + 1.0, count + 1.0 + identities], b""))))
    records += [(count + 1 + c, split(payload(count + 1 + c, [1.0, 2.0], b""))) for c in range(identities)]
    return write(folder, records, classes)


def write_new(folder: Path, images: list[bytes], labels: list[int], classes: int | None = None) -> Path:
    """As the newer InsightFace writer: every key is an image, from 0 on, with one label and no flag."""
    pairs = enumerate(zip(images, labels, strict=True))
    return write(folder, [(i, split(payload(i, label, image))) for i, (image, label) in pairs], classes)


def smooth_image(seed: int, height: int = 112, width: int = 112) -> np.ndarray:
    """A coloured image without sharp edges, uint8 ``[height, width, 3]``."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    """Encode an image, by Pillow."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()
