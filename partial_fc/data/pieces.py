"""Work on many samples in threads: cut into pieces of about the same size in bytes, the results in their order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

from partial_fc.data.archives import Archive
from partial_fc.data.sources import Sources

# A piece: about this many encoded bytes, and at most so many samples.
_PIECE_BYTES = 1 << 20
_PIECE = 64
# Taken for an image of unknown size.
_GUESSED_BYTES = 1 << 17
# Samples whose sizes are asked for at once.
_BLOCK = 4096

Result = TypeVar("Result")


def cut(
    source: Archive | Sources, count: int, ids: Callable[[np.ndarray], np.ndarray], begin: int = 0
) -> Iterator[np.ndarray]:
    """Cut rows into pieces, by the sizes of their images.

    Args:
        source: the data set.
        count: n, the number of rows.
        ids: of rows int64 ``[k]`` the samples, int64 ``[k]``.
        begin: the first row that is wanted.

    Yields:
        Rows, int64 ``[k]``; together ``begin`` to n - 1, in order.
    """
    for start in range(begin, count, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, count))
        lengths = source.lengths(ids(rows))
        lengths[lengths < 0] = _GUESSED_BYTES
        number = (np.cumsum(lengths) - lengths) // _PIECE_BYTES
        ends = (np.diff(number) > 0) | (np.arange(1, len(rows)) % _PIECE == 0)
        yield from np.split(rows, np.flatnonzero(ends) + 1)


def in_order(
    work: Callable[[np.ndarray, threading.Event], Result], pieces: Iterable[np.ndarray], threads: int
) -> Generator[tuple[np.ndarray, Result], None, None]:
    """Work on pieces in threads, a few ahead of the one whose result is wanted.

    Close it (``contextlib.closing``): what waits is then given up, and what runs is told to stop.

    Args:
        work: called with a piece, and with what is set once nobody wants the result any more.
        pieces: of the work.
        threads: how many.

    Yields:
        Each piece and its result, in order.
    """
    rest = iter(pieces)
    waiting: deque[tuple[np.ndarray, Future[Result]]] = deque()
    stopped = threading.Event()
    pool = ThreadPoolExecutor(threads)
    try:
        while True:
            for piece in islice(rest, 2 * threads + 1 - len(waiting)):
                waiting.append((piece, pool.submit(work, piece, stopped)))
            if not waiting:
                return
            piece, future = waiting.popleft()
            yield piece, future.result()
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
