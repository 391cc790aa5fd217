"""A picture of a data set and of what augmentation makes of it, for people to look at: ``partial-fc show``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from partial_fc.checks import require
from partial_fc.data.archives import Archive
from partial_fc.data.augment import Augmentation
from partial_fc.data.decode import MAX_PIXELS, ImageError, decode_image
from partial_fc.data.files import MachineError
from partial_fc.data.sources import Sources
from partial_fc.data.transforms import augment_image
from partial_fc.errors import ConfigError, DataError

# Lengths in pixels of the picture. Smaller images are enlarged, by a whole number, to about _TILE.
_TILE, _MARGIN, _GAP, _BAND = 112, 24, 8, 22
_TITLE, _TEXT, _SMALL = 24, 15, 12
_PAPER, _INK, _MUTED, _PLAIN, _BAD = "#efeeea", "#1c1c1c", "#6f6f6f", "#1f6fb2", "#c0392b"
# Most samples of a class that are shown as they are.
_SAMPLES = 3
# Pixels of the largest picture that is drawn: 600 MB.
_MOST_PIXELS = 200_000_000
# Under a tile: its sample's id, and room before the next row.
_LINE = 34


def contact_sheet(
    source: Archive | Sources,
    augmentation: Augmentation,
    *,
    image_size: int,
    seed: int,
    classes: int = 6,
    columns: int = 10,
    class_ids: Sequence[int] | None = None,
    max_image_pixels: int = MAX_PIXELS,
    largest_side: int = _MOST_PIXELS,
) -> Image.Image:
    """Draw a row for each of some classes: up to three samples as they are stored, then augmented views of them.

    The same arguments give the same picture. View v of row r is augmented as position ``r * columns + v`` of the sample
    stream would be. A sample that can't be used is a crossed tile that says the kind of its fault.

    Args:
        source: the data set.
        augmentation: what training does to the images.
        image_size: S, side in pixels that the images get.
        seed: of the augmentation.
        classes: how many classes, spread evenly over those that have a sample.
        columns: tiles in a row, 2 or more.
        class_ids: these classes instead.
        max_image_pixels: images with more can't be used.
        largest_side: of the picture in pixels, where the file that it shall go into has a limit.

    Returns:
        An RGB image.

    Raises:
        ConfigError: an argument is out of its range, a class has no sample, or the picture would be too large: its
            sides, or more than 200 million pixels.
    """
    for name, value, least in (("image_size", image_size, 1), ("classes", classes, 1), ("columns", columns, 2)):
        require(value >= least, "contact_sheet", name, value, f"{least} or more")
    labels = source.all_labels()
    chosen = _spread_classes(labels, classes) if class_ids is None else list(class_ids)
    sheet = _Sheet(image_size, len(chosen), columns, largest_side)
    sheet.head(_name(source.path), _summary(source, augmentation, image_size, seed))
    for row, label in enumerate(chosen):
        ids = np.flatnonzero(labels == label)
        if not len(ids):
            expected = f"one from 0 to {source.num_classes - 1} that has a sample"
            raise ConfigError(f"contact_sheet: class {label} has no sample, expected {expected}: name another class")
        sheet.caption(row, f"class {label}", _class_name(source, label), f"{len(ids):,} image{'s' * (len(ids) > 1)}")
        plain = ids[np.unique(np.linspace(0, len(ids) - 1, min(_SAMPLES, columns - 1)).round().astype(np.int64))]
        images = [_open(source, sample, image_size, max_image_pixels) for sample in plain.tolist()]
        for column, image in enumerate(images):
            sheet.tile(row, column, image, int(plain[column]))
        views = np.arange(columns - sheet.samples)
        for view, parameters in enumerate(augmentation.parameters(seed, row * columns + views)):
            image = images[view % len(images)]
            if isinstance(image, np.ndarray):
                image = augment_image(image, augmentation, parameters)
            sheet.tile(row, sheet.samples + view, image, int(plain[view % len(images)]))
    return sheet.image


class _Sheet:
    """The paper, and where things go on it."""

    def __init__(self, image_size: int, rows: int, columns: int, largest_side: int = _MOST_PIXELS) -> None:
        self.samples = min(_SAMPLES, columns - 1)
        self._zoom = max(1, round(_TILE / image_size))
        self._side = image_size * self._zoom
        self._pitch = self._side + _GAP
        self._fonts = {size: ImageFont.load_default(size=size) for size in (_TITLE, _TEXT, _SMALL)}
        self._top = _MARGIN + 3 * _BAND + 2 * _MARGIN + _GAP
        self._height = _BAND + self._side + _LINE
        width = max(2 * _MARGIN + columns * self._pitch - _GAP + _MARGIN, 480)
        height = self._top + rows * self._height + _GAP
        if max(width, height) > largest_side or width * height > _MOST_PIXELS:
            raise ConfigError(
                f"contact_sheet: the picture would have {width} x {height} pixels, expected at most {largest_side} a "
                f"side and {_MOST_PIXELS} in all: show fewer classes or columns, or smaller images (data.image_size)"
            )
        self.image = Image.new("RGB", (width, height), _PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def head(self, title: str, lines: Sequence[str]) -> None:
        """The lines above everything, and what the two groups of columns are."""
        width = self.image.width - 2 * _MARGIN
        self._text(_MARGIN, _MARGIN - 4, title, _TITLE, _INK, width)
        for number, line in enumerate(lines):
            self._text(_MARGIN, _MARGIN + 32 + number * _BAND, line, _TEXT, _MUTED, width)
        place = self._top - _BAND - _GAP
        self._text(_MARGIN, place, "as stored", _TEXT, _PLAIN, self.samples * self._pitch)
        self._text(self._left(self.samples), place, "augmented", _TEXT, _INK, width)

    def caption(self, row: int, label: str, name: str, count: str) -> None:
        """The line above a row."""
        text = "  ·  ".join(part for part in (label, name, count) if part)
        self._text(_MARGIN, self._place(row), text, _TEXT, _INK, self.image.width - 2 * _MARGIN)

    def tile(self, row: int, column: int, image: np.ndarray | str, sample: int) -> None:
        """An image uint8 ``[S, S, 3]``, or a kind of fault, with the sample's id under it."""
        left, top = self._left(column), self._place(row) + _BAND
        box = (left, top, left + self._side - 1, top + self._side - 1)
        if isinstance(image, str):
            self._crossed(box, image)
        else:
            # Enlarged without smoothing: the pixels are what the network sees.
            pixels = np.repeat(np.repeat(image, self._zoom, axis=0), self._zoom, axis=1)
            self.image.paste(Image.fromarray(pixels), box[:2])
        plain = column < self.samples
        if plain:
            self._draw.rectangle((box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2), outline=_PLAIN, width=2)
        self._text(left, box[3] + 5, str(sample), _SMALL, _PLAIN if plain else _MUTED, self._side)

    def _crossed(self, box: tuple[int, int, int, int], kind: str) -> None:
        self._draw.rectangle(box, fill="#eeeeea", outline=_BAD, width=2)
        self._draw.line((box[0], box[1], box[2], box[3]), fill=_BAD, width=2)
        self._draw.line((box[0], box[3], box[2], box[1]), fill=_BAD, width=2)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        font = self._fonts[_TEXT]
        left, top, right, bottom = self._draw.textbbox(middle, kind, font=font, anchor="mm")
        self._draw.rectangle((left - 5, top - 4, right + 5, bottom + 4), fill=_PAPER, outline=_BAD)
        self._draw.text(middle, kind, fill=_BAD, font=font, anchor="mm")

    def _left(self, column: int) -> int:
        """Where a column begins; there's a wider gap between the samples and their views."""
        return _MARGIN + column * self._pitch + (_MARGIN if column >= self.samples else 0)

    def _place(self, row: int) -> int:
        return self._top + row * self._height

    def _text(self, left: int, top: int, text: str, size: int, colour: str, width: int) -> None:
        """A line, cut where it's longer than ``width``."""
        font = self._fonts[size]
        if font.getlength(text) > width:
            while text and font.getlength(text + "...") > width:
                text = text[:-1]
            text += "..."
        self._draw.text((left, top), text, fill=colour, font=font)


def _open(source: Archive | Sources, sample: int, image_size: int, max_image_pixels: int) -> np.ndarray | str:
    """A sample's image, uint8 ``[S, S, 3]``; or of what kind its fault is."""
    try:
        return decode_image(source.encoded(np.array([sample]))[0], image_size, max_pixels=max_image_pixels)
    except ImageError as error:
        return error.kind
    except MachineError:
        raise
    except DataError:
        return "record"


def _spread_classes(labels: np.ndarray, count: int) -> list[int]:
    """Ids of ``count`` classes at even distances among those that have a sample, the first and the last included."""
    present = np.unique(labels)
    present = present[present >= 0]
    return present[np.unique(np.linspace(0, len(present) - 1, count).round().astype(np.int64))].tolist()


def _class_name(source: Archive | Sources, label: int) -> str:
    archives = [source] if isinstance(source, Archive) else source.archives
    # Of several data sets it would have to be said which one's name it is.
    names = archives[0].class_names if len(archives) == 1 else None
    return "" if names is None else names[label]


def _name(path: Path) -> str:
    """The last part of a data set's path; the folder too where that is a file, as every other one is ``train.rec``."""
    return "/".join(path.parts[-2:]) if path.suffix else path.name


def _summary(source: Archive | Sources, augmentation: Augmentation, image_size: int, seed: int) -> list[str]:
    """Two lines on the data set and on the augmentation."""
    plain = Augmentation(flip=0.0)
    settings = [(field.name, getattr(augmentation, field.name)) for field in dataclasses.fields(augmentation)]
    changed = ", ".join(f"{name} {value:.3g}" for name, value in settings if value != getattr(plain, name))
    return [
        f"{len(source):,} images, {source.num_classes:,} classes, shown at {image_size} x {image_size}",
        f"augmentation (seed {seed}): {'none' if augmentation.identity else changed}",
    ]
