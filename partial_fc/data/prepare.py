"""Writes a data set anew, as RecordIO or WebDataset shards, copied or resized: what ``partial-fc prepare`` does.

The bytes that come out depend on the samples and the arguments alone, not on the number of workers, nor on whether the
work was interrupted. Threads read, check, decode and encode pieces of the samples; one writes them, in order. After
every 64 MiB or 10 seconds, and when it is interrupted, what was written is brought to the disk, and then
``prepare.json``, which says up to where it counts. Files have names that end in ``.partial`` until all are complete.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import PIL

from partial_fc.checks import require
from partial_fc.data.archives import Archive
from partial_fc.data.class_map import REMOVED, count_classes, first_of_each
from partial_fc.data.convert import Converter, Ready, Skipped
from partial_fc.data.decode import MAX_PIXELS
from partial_fc.data.destination import STATE_FILE, Destination, LostFiles, State, written_to
from partial_fc.data.pieces import cut, in_order
from partial_fc.data.sources import Sources
from partial_fc.data.table import UNUSABLE
from partial_fc.data.writers import PlainRecordWriter, ShardWriter
from partial_fc.errors import ConfigError, DataError
from partial_fc.machine import processors
from partial_fc.permutation import KeyedPermutation, hash64

logger = logging.getLogger("partial_fc.data")

# Labels from here on may have been rounded when they became float32.
_FLOAT32_EXACT = 1 << 24
_COMMIT_BYTES, _COMMIT_SECONDS = 1 << 26, 10.0
# Samples whose bytes are part of the source's fingerprint.
_PROBES = 64
_SHUFFLE_KEY = 0x707265706172


@dataclass(frozen=True)
class PrepareReport:
    """What was written.

    Attributes:
        destination: the folder.
        outcome: ``written``; ``resumed``: an earlier, interrupted run had done a part; ``complete``: it was all there.
        samples: N of the source.
        written: samples of the new set.
        reencoded: those of them that were decoded and encoded; the others were copied.
        skipped: samples that were left out, by kind of fault, as ``faults.FAULT_KINDS`` has them; ``removed``: those of
            classes that the class map removes.
        reasons: by kind, the first few samples and why.
        bytes: of all files.
        num_classes: C of the new set.
        files: number of files, without ``prepare.json``.
    """

    destination: Path
    outcome: Literal["written", "resumed", "complete"]
    samples: int
    written: int
    reencoded: int
    skipped: dict[str, int]
    reasons: dict[str, list[str]]
    bytes: int
    num_classes: int
    files: int


def prepare(
    source: Archive | Sources,
    destination: str | os.PathLike[str],
    *,
    format: Literal["recordio", "webdataset"],
    image_size: int | None = None,
    quality: int | None = None,
    workers: int | None = None,
    shard_size: int = 10_000,
    shuffle_seed: int | None = None,
    class_map: np.ndarray | None = None,
    max_image_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
) -> PrepareReport:
    """Write a data set of any format as RecordIO or WebDataset.

    ``recordio``: ``train.rec`` and ``train.idx``, in plain MXNet layout (see ``PlainRecordWriter``), sorted by class.
    ``webdataset``: ``train-000000.tar``, ..., in the source's order or shuffled. Both have ``property``, with the
    number of classes and the height and width of the first image, and, where the source names its classes,
    ``classes.txt``, the name of class i in line i. Samples that can't be used are left out and counted. Run again after
    an interruption, with the same arguments, it goes on where it was.

    Args:
        source: what to write; several archives become one set.
        destination: folder; made if it isn't there. It has to be empty, or prepare's own.
        format: of the files that are written.
        image_size: S: images of another size, or not upright, are resized to ``S x S`` and encoded as JPEG. Default:
            each keeps its size. Images of formats that DALI doesn't decode, such as GIF, are encoded in any case.
        quality: of JPEG, 1 to 100: every image is encoded anew. Default: those that ``image_size`` leaves as they are
            are copied, byte for byte, and the others get 95, as by MXNet's ``im2rec.py`` and InsightFace's
            ``face2rec2.py``. Those subsample colour (4:2:0, the default of OpenCV); here it isn't (4:4:4), for 1.4
            times the bytes: each loss of quality comes on top of that of the source, colour at half the side of a
            small face is little, and decoders differ in how they interpolate it.
        workers: threads; default: as many as this process may use processors.
        shard_size: samples of a WebDataset shard; 10,000 as in img2dataset (webdataset's own writer has 100,000, or
            3 GB, which makes fewer shards than a large job has readers).
        shuffle_seed: WebDataset only: shuffles the samples, for readers that don't; the same seed, the same order.
        class_map: int64 ``[C]``, the new id of each class, -1 for those whose samples are left out; see
            ``data.class_map``. A class that several become has the name of the lowest of them. Default: ids stay.
        max_image_pixels: images with more are skipped.
        progress: called with the samples done and their total.

    Returns:
        What was written.

    Raises:
        ConfigError: an argument can't be used; the class map has another C; labels of 2**24 and more for RecordIO; the
            destination holds other files, or a complete set of other arguments.
        DataError: no sample can be used, the source can't be read, or the destination can't be written to.
    """
    labels = _new_labels(source, class_map)
    arguments: dict[str, Any] = {
        "format": format,
        "image_size": image_size,
        "quality": quality,
        "max_image_pixels": max_image_pixels,
    }
    if format == "webdataset":
        arguments |= {"shard_size": shard_size, "shuffle_seed": shuffle_seed}
    if class_map is not None:
        # Only where there is one: what was written before there were class maps stays complete.
        arguments["class_map"] = blake2b(class_map.tobytes(), digest_size=16).hexdigest()
    _check_arguments(arguments, workers, shuffle_seed)
    place = Path(destination)
    _check_source(source, labels, format, place)
    with written_to(place):
        place.mkdir(parents=True, exist_ok=True)
        with Destination(place) as files:
            return _Job(source, labels, class_map, files, arguments, workers or processors(), progress).run()


def _check_arguments(arguments: dict[str, Any], workers: int | None, shuffle_seed: int | None) -> None:
    format, quality = arguments["format"], arguments["quality"]
    require(format in ("recordio", "webdataset"), "prepare", "format", format, "recordio or webdataset")
    for name in ("image_size", "quality", "max_image_pixels", "shard_size"):
        value = arguments.get(name)
        require(value is None or value >= 1, "prepare", name, value, "1 or more")
    require(quality is None or quality <= 100, "prepare", "quality", quality, "at most 100")
    require(workers is None or workers >= 1, "prepare", "workers", workers, "1 or more")
    require(
        shuffle_seed is None or format == "webdataset",
        "prepare",
        "shuffle_seed",
        shuffle_seed,
        "none with format=recordio, whose samples are sorted by class",
    )


def _new_labels(source: Archive | Sources, class_map: np.ndarray | None) -> np.ndarray:
    """Labels of all samples in the new set, int64 ``[N]``: ``UNUSABLE`` where a sample or its class is left out."""
    labels = source.all_labels()
    if class_map is None:
        return labels
    if len(class_map) != source.num_classes:
        raise ConfigError(
            f"{source.path}: has {source.num_classes} classes, the class map is of {len(class_map)}: expected the map "
            "of the head that was trained on this set"
        )
    # Behind the last class stands what samples without one get.
    return np.append(np.where(class_map == REMOVED, UNUSABLE, class_map), UNUSABLE)[labels]


def _check_source(source: Archive | Sources, labels: np.ndarray, format: str, destination: Path) -> None:
    largest = int(labels.max(initial=UNUSABLE))
    if largest == UNUSABLE:
        why = f"; {fault.reason}" if len(source) and (fault := source.fault(0)) else ""
        raise DataError(f"{source.path}: none of its {len(source)} samples can be used{why}")
    if format == "recordio" and largest >= _FLOAT32_EXACT:
        raise ConfigError(
            f"{source.path}: its largest label is {largest}, and RecordIO's are float32, exact below {_FLOAT32_EXACT}: "
            "set format=webdataset"
        )
    place = destination.resolve()
    for archive in _archives(source):
        root = archive.path.resolve()
        if archive.format == "folder" and (root == place or root in place.parents):
            raise ConfigError(
                f"{destination} is inside the source {archive.path}, which would then change: name another one"
            )
    if destination.exists() and not destination.is_dir():
        raise ConfigError(f"{destination} is a file, expected a folder or a new name")


class _Job:
    """One call of :func:`prepare`."""

    def __init__(
        self,
        source: Archive | Sources,
        labels: np.ndarray,
        class_map: np.ndarray | None,
        place: Destination,
        arguments: dict[str, Any],
        workers: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.source = source
        self.labels = labels
        self.class_map = class_map
        self.place = place
        self.arguments = arguments
        self.workers = workers
        self.progress = progress
        self.converter = Converter(
            source, arguments["format"], arguments["image_size"], arguments["quality"], arguments["max_image_pixels"]
        )

    def run(self) -> PrepareReport:
        place, folder = self.place, self.place.folder
        state = place.load()
        if state is not None and state.phase == "renaming":
            place.rename(state)
        described = _describe(self.source, self.source.all_labels())
        now = State(self.arguments, described, f"OpenCV {cv2.__version__}, Pillow {PIL.__version__}")
        if state is not None and state.phase == "complete":
            place.check_complete(state, now)
            logger.info("%s is complete: nothing to do", folder)
            return self._report(state, "complete")
        place.check_foreign(state)
        if state is not None and (changed := state.changed(now, encoder=True)):
            logger.warning("%s: starts over (%s)", folder, changed)
            state = None
        if state is not None:
            try:
                return self._write(state, self._writer(state), "resumed" if state.position else "written")
            except LostFiles as error:
                logger.warning("%s: starts over (%s)", folder, error)
        place.clear()
        for sample in np.flatnonzero(self.source.all_labels() == UNUSABLE).tolist():
            fault = self.source.fault(sample)
            now.skip(fault.kind if fault else "label", fault.reason if fault else self.source.locate(sample))
        self._count_removed(now)
        # Before any other file: what is there without a state is taken for somebody else's.
        place.save(now)
        return self._write(now, self._writer(now), "written")

    def _count_removed(self, state: State) -> None:
        if self.class_map is None:
            return
        removed = np.flatnonzero(self.class_map == REMOVED)
        count = int(np.isin(self.source.all_labels(), removed).sum())
        if count:
            state.skipped["removed"] = count
            state.reasons["removed"] = [f"of {len(removed)} classes that the class map removes"]

    def _writer(self, state: State) -> PlainRecordWriter | ShardWriter:
        try:
            if self.arguments["format"] == "recordio":
                return PlainRecordWriter(self.place.folder, state=state.writer)
            return ShardWriter(self.place.folder, shard_size=self.arguments["shard_size"], state=state.writer)
        except (DataError, FileNotFoundError) as error:
            raise LostFiles(str(error)) from error

    def _write(
        self, state: State, writer: PlainRecordWriter | ShardWriter, outcome: Literal["written", "resumed"]
    ) -> PrepareReport:
        order = self._order()
        if state.position:
            logger.info("%s: goes on at sample %d of %d", self.place.folder, state.position, len(order))
        try:
            pieces = cut(self.source, len(order), lambda rows: order[rows], state.position)

            def convert(rows: np.ndarray, stopped: threading.Event) -> list[Skipped | Ready]:
                return self.converter.convert(order[rows], stopped)

            with closing(in_order(convert, pieces, self.workers)) as converted:
                state = self._write_pieces(state, writer, order, converted)
            if not state.written:
                self._give_up(state)
            state.writer = writer.finish()
            # The .idx, without which nothing is a RecordIO set, is the last of the writer's.
            self.place.complete(state, [*self._write_extras(state), *writer.names()])
        finally:
            writer.close()
        return self._report(state, outcome)

    def _write_pieces(
        self,
        state: State,
        writer: PlainRecordWriter | ShardWriter,
        order: np.ndarray,
        converted: Iterable[tuple[np.ndarray, list[Skipped | Ready]]],
    ) -> State:
        """Write what comes, and commit it from time to time and when interrupted; returns the state after it."""
        committed, committed_at = writer.written, time.monotonic()
        try:
            for rows, results in converted:
                # The state counts whole pieces: where one is interrupted, it speaks of the end of the one before.
                state = self._write_piece(state, writer, order[rows], results)
                if writer.written - committed >= _COMMIT_BYTES or time.monotonic() - committed_at >= _COMMIT_SECONDS:
                    writer.sync()
                    self.place.save(state)
                    committed, committed_at = writer.written, time.monotonic()
                if self.progress is not None:
                    self.progress(state.position, len(order))
        except OSError:
            # After a failed fsync the next one may succeed, with what was lost: the last commit stands.
            raise
        except BaseException:
            # It stands, too, where a file was just being closed.
            with suppress(OSError, ValueError):
                writer.sync()
                self.place.save(state)
            raise
        return state

    def _write_piece(
        self,
        before: State,
        writer: PlainRecordWriter | ShardWriter,
        samples: np.ndarray,
        results: list[Skipped | Ready],
    ) -> State:
        """Write a piece; returns the state after it, with the files' ends."""
        state = copy.deepcopy(before)
        for sample, label, result in zip(samples.tolist(), self.labels[samples].tolist(), results, strict=True):
            if isinstance(result, Skipped):
                state.skip(*result)
                continue
            writer.write(sample, result.image, label)
            state.size = state.size or [result.height, result.width]
            state.written += 1
            state.reencoded += result.reencoded
        state.position += len(samples)
        state.writer = writer.state()
        return state

    def _order(self) -> np.ndarray:
        """The samples in the order in which they're written, int64."""
        usable = np.flatnonzero(self.labels != UNUSABLE)
        if self.arguments["format"] == "recordio":
            return usable[np.argsort(self.labels[usable], kind="stable")]
        seed = self.arguments["shuffle_seed"]
        if seed is None:
            return usable
        permutation = KeyedPermutation(len(usable), hash64(_SHUFFLE_KEY, seed))
        return usable[permutation(np.arange(len(usable), dtype=np.int64))]

    def _write_extras(self, state: State) -> list[str]:
        """Write the small files, under their partial names; returns their final ones."""
        extras = {}
        if (class_names := self._class_names()) is not None:
            # A line's end in a name would move all names behind it.
            names = (re.sub(r"[\r\n]", " ", name) for name in class_names)
            extras["classes.txt"] = "".join(f"{name}\n" for name in names)
        assert state.size is not None
        height, width = state.size
        extras["property"] = f"{self._num_classes},{height},{width}\n"
        for name, text in extras.items():
            self.place.write(name, text)
        return list(extras)

    @property
    def _num_classes(self) -> int:
        return self.source.num_classes if self.class_map is None else count_classes(self.class_map)

    def _class_names(self) -> Iterable[str] | None:
        names = _class_names(self.source)
        if names is None or self.class_map is None:
            return names
        # Sources may have fewer names than classes where their classes are merged.
        old = dict(enumerate(names))
        return (old.get(first, "") for first in first_of_each(self.class_map).tolist())

    def _give_up(self, state: State) -> None:
        self.place.clear()
        (self.place.folder / STATE_FILE).unlink()
        reason = next(iter(state.reasons.values()))[0]
        raise DataError(f"{self.source.path}: none of its {len(self.source)} samples can be used; {reason}")

    def _report(self, state: State, outcome: Literal["written", "resumed", "complete"]) -> PrepareReport:
        return PrepareReport(
            destination=self.place.folder,
            outcome=outcome,
            samples=len(self.source),
            written=state.written,
            reencoded=state.reencoded,
            skipped=state.skipped,
            reasons=state.reasons,
            bytes=sum(state.files.values()),
            num_classes=self._num_classes,
            files=len(state.files),
        )


def _archives(source: Archive | Sources) -> Sequence[Archive]:
    return source.archives if isinstance(source, Sources) else [source]


def _class_names(source: Archive | Sources) -> Iterable[str] | None:
    """Names of the C classes; None unless all archives name theirs."""
    lists = [archive.class_names for archive in _archives(source)]
    named = [names for names in lists if names is not None]
    if len(named) < len(lists):
        return None
    # Where classes are merged, the same id is the same class, and the longest list has them all.
    return chain(*named) if sum(map(len, named)) == source.num_classes else max(named, key=len)


def _describe(source: Archive | Sources, labels: np.ndarray) -> dict[str, Any]:
    """What tells a source from another one, wherever it lies: its labels, sizes, and the bytes of some samples."""
    digest = blake2b(digest_size=16)
    size = 1 << 20
    for start in range(0, len(source), size):
        ids = np.arange(start, min(start + size, len(source)), dtype=np.int64)
        digest.update(np.asarray(labels[ids], dtype=np.int64).tobytes() + source.lengths(ids).tobytes())
    for sample in np.unique(np.linspace(0, len(source) - 1, _PROBES, dtype=np.int64)):
        with suppress(DataError):
            digest.update(source.encoded(np.array([sample]))[0].tobytes())
    for name in _class_names(source) or ():
        digest.update(name.encode("utf-8", "surrogateescape") + b"\n")
    return {"samples": len(source), "num_classes": source.num_classes, "fingerprint": digest.hexdigest()}
