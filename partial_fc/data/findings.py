"""The report of ``partial-fc validate``: what was found in a data set, and its text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

_MEANING = {
    "record": "its record is damaged, or its file can't be read",
    "label": "no label that can be used",
    "empty": "no bytes of an image",
    "oversized": "more pixels than are allowed",
    "image": "bytes that are no whole image",
}


@dataclass(frozen=True)
class Spread:
    """How numbers are spread: the least, the median, the mean, the largest, and their sum."""

    least: int
    median: float
    mean: float
    most: int
    total: int


@dataclass(frozen=True)
class Example:
    """A sample that can't be used: its id, and why, in words, with its file and byte."""

    sample: int
    reason: str


@dataclass(frozen=True)
class Pair:
    """Two samples whose encoded images are the same bytes: their ids, classes and places (file and byte)."""

    samples: tuple[int, int]
    classes: tuple[int, int]
    places: tuple[str, str]


@dataclass(frozen=True)
class ClassFigures:
    """The classes of a data set, all of its samples counted.

    Attributes:
        num_classes: C.
        lowest, highest: the least and the largest class id that a sample has.
        missing: how many of the C classes have no sample.
        missing_ranges: the first few ranges of such ids, both ends included.
        single: how many classes have a single sample.
        samples: samples a class, of those that have any.
        histogram: (from, to, classes): how many classes have from ``from`` to ``to`` samples.
    """

    num_classes: int
    lowest: int
    highest: int
    missing: int
    missing_ranges: list[tuple[int, int]]
    single: int
    samples: Spread
    histogram: list[tuple[int, int, int]]


@dataclass(frozen=True)
class ImageFigures:
    """The images that can be used, of the samples that were checked.

    Attributes:
        sizes: (width, height, images), upright, the commonest first; ten at most.
        distinct_sizes: how many different sizes there are.
        other_size: images that aren't ``image_size`` x ``image_size``; None where no ``image_size`` was given.
        not_square: images whose width isn't their height.
        grey: images without colour, whatever they are stored as.
        encoded_bytes: of an encoded image; None where there's no image.
    """

    sizes: list[tuple[int, int, int]]
    distinct_sizes: int
    other_size: int | None
    not_square: int
    grey: int
    encoded_bytes: Spread | None


@dataclass(frozen=True)
class Copies:
    """Encoded images that occur more than once, byte by byte, among the samples that were checked.

    Attributes:
        within: samples that repeat an earlier one of their class.
        across: images that several classes have.
        across_samples: samples that show one of those.
        within_first, across_first: the first few, a pair each.
    """

    within: int
    across: int
    across_samples: int
    within_first: list[Pair]
    across_first: list[Pair]


@dataclass(frozen=True)
class ValidationReport:
    """What was found in a data set.

    Attributes:
        path: of the data set.
        samples: N.
        checked: how many of them were decoded, spread evenly over the data set.
        unusable: how many of those can't be used, by kind: each of ``FAULT_KINDS``, 0 where there is none.
        first: the first few of each kind.
        bad_checksums: records whose checksum isn't that of their data; None where the format has no checksums, or
            where they were skipped.
        checksums_first: the first few of these, file and byte.
        checksums_skipped: whether there are checksums that weren't compared, as not all samples were checked.
        classes, images, copies: see there.
        image_size: what the sizes of the images were compared with, if anything.
        seconds: how long it took.
    """

    path: str
    samples: int
    checked: int
    unusable: dict[str, int]
    first: dict[str, list[Example]]
    bad_checksums: int | None
    checksums_first: list[str]
    checksums_skipped: bool
    classes: ClassFigures
    images: ImageFigures
    copies: Copies
    image_size: int | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every sample that was checked can be used."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """What makes the data set unfit, a line each; empty where nothing does."""
        return [line for line, _ in self.named_problems()]

    def named_problems(self) -> Iterator[tuple[str, list[str]]]:
        """Each of the problems, with the first few places where it is, a line each."""
        for kind, number in self.unusable.items():
            if number:
                places = [f"sample {example.sample}: {example.reason}" for example in self.first[kind]]
                yield f"{_count(number, 'sample')}: {_MEANING[kind]}", places
        if self.bad_checksums:
            line = f"{_count(self.bad_checksums, 'record')}: the checksum isn't that of the data"
            yield line, self.checksums_first

    @property
    def warnings(self) -> list[str]:
        """What should be looked at, a line each: it doesn't keep anybody from training."""
        lines = []
        if self.copies.across:
            images, samples = _count(self.copies.across, "image"), self.copies.across_samples
            lines.append(f"{images} in several classes ({samples:,} samples): some of their labels are wrong")
        if self.classes.missing:
            shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in self.classes.missing_ranges)
            more = ", ..." if sum(b - a + 1 for a, b in self.classes.missing_ranges) < self.classes.missing else ""
            lines.append(f"{_count(self.classes.missing, 'class')} without a sample: {shown}{more}")
        if self.images.not_square:
            lines.append(
                f"{_count(self.images.not_square, 'image')} not square: training makes squares of them, distorted"
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The same as numbers, strings, lists and dictionaries, as JSON wants them, with ``ok`` and the lines."""
        return {"ok": self.ok, "problems": self.problems, "warnings": self.warnings, **asdict(self)}


def render(report: ValidationReport, width: int = 100) -> str:
    """Write the report as text that fits a screen: the verdict, what is wrong, then the figures.

    Args:
        report: what was found.
        width: of a line, in characters.
    """
    problems = list(report.named_problems())
    # Few problems leave room for several places of each.
    named = max(1, 6 // max(1, len(problems)))
    lines = [_verdict(report)]
    for line, places in problems:
        lines.append(f"  {line}")
        for place in places[:named]:
            lines += _wrap("    ", place, width)
    for line in report.warnings:
        lines += _wrap("  warning: ", line, width)
    lines.append("")
    for name, shown in _figures(report):
        for row, line in enumerate(shown):
            lines += _wrap(f"{name if row == 0 else '':<12}", line, width)
    return "\n".join(lines)


def _verdict(report: ValidationReport) -> str:
    samples = f"{report.checked:,} samples" + (f" (of {report.samples:,})" if report.checked < report.samples else "")
    if report.ok:
        return f"OK: {report.path}: all {samples} can be used"
    bad = sum(report.unusable.values())
    return f"NOT OK: {report.path}: " + (f"{bad:,} of {samples} can't be used" if bad else report.problems[0])


def _figures(report: ValidationReport) -> Iterator[tuple[str, list[str]]]:
    """The figures: a name, and its lines."""
    classes, images, copies = report.classes, report.images, report.copies
    labels = f"{classes.num_classes:,}; labels {classes.lowest} to {classes.highest}; "
    labels += f"{classes.missing:,} without a sample, {classes.single:,} with a single one"
    yield "classes", [labels, f"samples a class: {_show_spread(classes.samples)}; classes by samples:"]
    largest = max(count for _, _, count in classes.histogram)
    spans = [f"{a}" if a == b else f"{a}-{b}" for a, b, _ in classes.histogram]
    wide = max(map(len, spans))
    for span, (_, _, count) in zip(spans, classes.histogram, strict=True):
        yield "", [f"{span:>{wide}} {'#' * -(-40 * count // largest):<40} {count:,}"]
    if images.encoded_bytes is not None:
        number = report.checked - sum(report.unusable.values())
        shown = [f"{w} x {h}: {count:,}" for w, h, count in images.sizes]
        more = images.distinct_sizes - len(shown)
        yield "sizes", [", ".join(shown) + (f", and {more:,} other sizes" if more else "")]
        if images.other_size:
            share = f"{images.other_size:,} ({images.other_size / number:.1%})"
            yield "", [f"not {report.image_size} x {report.image_size}, training resizes them: {share}"]
        yield "grey", [f"{images.grey:,} ({images.grey / number:.1%})"]
        yield "bytes", [f"{_show_spread(images.encoded_bytes)}; {images.encoded_bytes.total / 1e6:,.1f} MB in all"]
        pairs = [_show_pair(pair) for pair in (*copies.across_first[:2], *copies.within_first[:2])]
        yield "copies", [f"{copies.within:,} within a class, {copies.across:,} images in several classes", *pairs]
    if report.bad_checksums is not None:
        yield "checksums", [f"{report.bad_checksums:,} wrong"]
    elif report.checksums_skipped:
        yield "checksums", ["not checked (--limit)"]
    yield "time", [f"{report.seconds:.1f} s, {report.checked / max(report.seconds, 1e-9):,.0f} samples a second"]


def _show_spread(spread: Spread) -> str:
    median = f"{spread.median:,.1f}".removesuffix(".0")
    return f"{spread.least:,} to {spread.most:,}, median {median}, mean {spread.mean:,.1f}"


def _show_pair(pair: Pair) -> str:
    (a, b), (one, other) = pair.samples, pair.classes
    classes = f"class {one}" if one == other else f"classes {one} and {other}"
    return f"  {classes}: samples {a} and {b} ({pair.places[0]}; {pair.places[1]})"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def _wrap(begin: str, text: str, width: int) -> list[str]:
    """Break a text into lines; those after the first stand under the figures. A path stays whole, to be copied."""
    return textwrap.wrap(
        begin + text, width, subsequent_indent=" " * 12, break_on_hyphens=False, break_long_words=False
    )
