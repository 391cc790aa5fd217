"""Writes a data set of made-up faces, for demonstrations and tests on a machine that has no data."""

from __future__ import annotations

import math
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path

import cv2
import numpy as np

from partial_fc.data.faces import Painter
from partial_fc.data.writers import RecordWriter, commit_file
from partial_fc.errors import ConfigError, DataError
from partial_fc.machine import processors
from partial_fc.permutation import KeyedPermutation, hash64

_FOLDS = 10
# Validation identities are numbered from here, so that no train set is large enough to share one.
_VALIDATION_START = 1 << 48
# Identities that a worker draws at a time.
_BATCH = 8
_PAIRS_KEY = 0x7061697273


def make_dataset(
    folder: str | Path,
    *,
    identities: int = 2000,
    images_per_identity: int = 20,
    validation_identities: int = 200,
    pairs: int = 6000,
    image_size: int = 112,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``train.rec``, ``train.idx``, ``property`` and ``demo_val.bin`` of drawn identities.

    The files are the same for any number of workers. ``train.idx`` appears last, so a folder that has it is complete.

    Args:
        folder: where the files go; made if it isn't there.
        identities: classes of the train set.
        images_per_identity: of a train and of a validation identity.
        validation_identities: other identities, for ``demo_val.bin``.
        pairs: of ``demo_val.bin``, half of them of the same identity; a multiple of 20 (ten folds).
        image_size: pixels of a side, 16 or more.
        seed: chooses the identities and their images.
        workers: processes that draw; by default as many as this process may use processors. With 1, the
            caller's process draws.
        progress: called with the identities done and their total, every few identities.

    Raises:
        ConfigError: the sizes can't be had; all that is wrong is said at once.
        DataError: the folder can't be written to, or a worker died.
    """
    _check_sizes(identities, images_per_identity, validation_identities, pairs, image_size, workers)
    folder = Path(folder)
    numbers = [*range(identities), *range(_VALIDATION_START, _VALIDATION_START + validation_identities)]
    batches = [numbers[start : start + _BATCH] for start in range(0, len(numbers), _BATCH)]
    workers = min(len(batches), workers or processors())
    validation: list[bytes] = []
    done = 0
    with RecordWriter(folder, image_size=image_size) as writer:
        for images in _drawn(batches, images_per_identity, image_size, seed, workers):
            for of_one in images:
                if done < identities:
                    for image in of_one:
                        writer.write(image, done)
                else:
                    validation += of_one
                done += 1
            if progress is not None:
                progress(done, len(numbers))
        _write_pairs(folder / "demo_val.bin", validation, images_per_identity, pairs, seed)


def _check_sizes(
    identities: int,
    images_per_identity: int,
    validation_identities: int,
    pairs: int,
    image_size: int,
    workers: int | None,
) -> None:
    wrong = []
    for name, value, least in (
        ("identities", identities, 1),
        ("images_per_identity", images_per_identity, 2),
        ("validation_identities", validation_identities, 2),
        ("image_size", image_size, 16),
        ("workers", 1 if workers is None else workers, 1),
    ):
        if value < least:
            wrong.append(f"{name} must be at least {least}, got {value}")
    if pairs < 2 * _FOLDS or pairs % (2 * _FOLDS):
        wrong.append(f"pairs must be a positive multiple of {2 * _FOLDS}, got {pairs}")
    if not wrong:
        within = images_per_identity * (images_per_identity - 1) // 2
        between = validation_identities * (validation_identities - 1) // 2 * images_per_identity**2
        possible = min(validation_identities * within, between)
        if pairs // 2 > possible:
            wrong.append(
                f"pairs must be at most {possible // _FOLDS * 2 * _FOLDS} with {validation_identities} validation "
                f"identities of {images_per_identity} images, got {pairs}"
            )
    if wrong:
        raise ConfigError("; ".join(wrong))


def _drawn(
    batches: list[list[int]], images_per_identity: int, image_size: int, seed: int, workers: int
) -> Iterator[list[list[bytes]]]:
    """For each batch of identities, in order: the images of each."""
    if workers == 1:
        painter = Painter(image_size, seed)
        for batch in batches:
            yield [painter.images(identity, images_per_identity) for identity in batch]
        return
    # OpenCV's threads don't survive a fork; and each process has a processor's work anyway.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    pool = ProcessPoolExecutor(
        workers, mp_context=_context(), initializer=_start_worker, initargs=(image_size, seed, images_per_identity)
    )
    try:
        yield from pool.map(_draw_batch, batches)
    except BrokenProcessPool as error:
        raise DataError("a process that draws images died (out of memory?): try again with workers=1") from error
    finally:
        pool.shutdown(cancel_futures=True)
        cv2.setNumThreads(threads)


def _context() -> BaseContext:
    """Fork where it's safe, because it starts in milliseconds and asks nothing of the caller's main module."""
    return get_context("fork" if sys.platform == "linux" and threading.active_count() == 1 else "spawn")


class _Worker:
    """What a worker process keeps between its batches."""

    painter: Painter
    images_per_identity: int


def _start_worker(image_size: int, seed: int, images_per_identity: int) -> None:
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.painter = Painter(image_size, seed)
    _Worker.images_per_identity = images_per_identity


def _end_with_parent() -> None:
    """A worker of a killed process would wait for ever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _draw_batch(identities: list[int]) -> list[list[bytes]]:
    return [_Worker.painter.images(identity, _Worker.images_per_identity) for identity in identities]


def _write_pairs(path: Path, images: list[bytes], images_per_identity: int, pairs: int, seed: int) -> None:
    """Write a verification set: ten folds, each of same pairs and then as many different ones, no pair twice."""
    same, different = _choose_pairs(len(images) // images_per_identity, images_per_identity, pairs // 2, seed)
    bins: list[bytes] = []
    issame: list[bool] = []
    size = pairs // 2 // _FOLDS
    for fold in range(_FOLDS):
        for chosen, is_same in ((same, True), (different, False)):
            for first, second in chosen[fold * size : (fold + 1) * size]:
                bins += [images[first], images[second]]
                issame.append(is_same)
    temporary = path.with_name(f"{path.name}.partial")
    with open(temporary, "wb") as file:
        pickle.dump((bins, issame), file, protocol=4)
    commit_file(temporary, path)


def _choose_pairs(
    identities: int, images_per_identity: int, count: int, seed: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """``count`` same and ``count`` different pairs of image numbers. The same ones take the identities in turn."""
    each = images_per_identity
    key = hash64(seed, _PAIRS_KEY)
    same = []
    rounds = np.arange(-(-count // identities), dtype=np.int64)
    within = [KeyedPermutation(each * (each - 1) // 2, hash64(key, i))(rounds) for i in range(identities)]
    for turn in range(count):
        identity = turn % identities
        first, second = _unrank_pair(int(within[identity][turn // identities]))
        same.append((identity * each + first, identity * each + second))
    between = KeyedPermutation(identities * (identities - 1) // 2 * each * each, key)
    different = []
    for number in between(np.arange(count, dtype=np.int64)).tolist():
        rank, of_both = divmod(number, each * each)
        one, other = _unrank_pair(rank)
        different.append((one * each + of_both // each, other * each + of_both % each))
    return same, different


def _unrank_pair(rank: int) -> tuple[int, int]:
    """Pair ``(a, b)``, ``a < b``, number ``rank`` of (0, 1), (0, 2), (1, 2), (0, 3), ..."""
    second = (1 + math.isqrt(1 + 8 * rank)) // 2
    return rank - second * (second - 1) // 2, second
