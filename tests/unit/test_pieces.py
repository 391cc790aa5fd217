from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_fc.data import pieces as module
from partial_fc.data.pieces import cut, in_order


class Sizes:
    """A data set of which only the sizes are asked."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = np.array(lengths, dtype=np.int64)

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        return self._lengths[ids]


def cut_all(lengths: Sequence[int], begin: int = 0, reverse: bool = False) -> list[list[int]]:
    last = len(lengths) - 1
    found = cut(Sizes(lengths), len(lengths), lambda rows: last - rows if reverse else rows, begin)  # type: ignore[arg-type]
    return [piece.tolist() for piece in found]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 3 << 20), max_size=200), st.integers(0, 200))
def test_every_row_is_in_one_piece_and_no_piece_is_large(lengths: list[int], begin: int) -> None:
    found = cut_all(lengths, begin)
    assert sum(found, []) == list(range(begin, len(lengths)))
    for piece in found:
        sizes = [module._GUESSED_BYTES if lengths[row] < 0 else lengths[row] for row in piece]
        assert 1 <= len(piece) <= 64
        # All but the last of them fit.
        assert sum(sizes[:-1]) < 1 << 20


def test_small_images_are_cut_by_number_and_unknown_ones_by_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 256)
    assert [len(piece) for piece in cut_all([1000] * 1000)] == [64] * 15 + [40]
    assert {len(piece) for piece in cut_all([-1] * 80)} == {8}
    assert [len(piece) for piece in cut_all([5 << 20] * 3)] == [1, 1, 1]


def test_the_sizes_are_those_of_the_samples_of_the_rows() -> None:
    assert cut_all([10, 10, 2 << 20, 2 << 20], reverse=True) == [[0], [1], [2, 3]]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_the_order_of_the_pieces_and_few_are_ahead(threads: int) -> None:
    begun: list[int] = []
    first = threading.Event()

    def work(rows: np.ndarray, stopped: threading.Event) -> int:
        begun.append(int(rows[0]))
        if threads > 1:
            # The first is done last.
            first.wait(30) if rows[0] == 0 else first.set()
        return int(rows[0]) ** 2

    taken: list[int] = []

    def some() -> list[np.ndarray]:
        for number in range(50):
            taken.append(number)
            yield np.array([number])

    with closing(in_order(work, some(), threads)) as found:
        for number, (rows, result) in enumerate(found):
            assert (rows.tolist(), result) == ([number], number**2)
            assert len(taken) <= number + 2 * threads + 1
    assert sorted(begun) == list(range(50))


@pytest.mark.timeout(60)
def test_closing_gives_up_what_waits_and_stops_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    told: list[bool] = []

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            given_up.set()
            super().shutdown(wait=wait)

    given_up, running = threading.Event(), threading.Event()

    def work(rows: np.ndarray, stopped: threading.Event) -> None:
        begun.append(int(rows[0]))
        if rows[0] == 1:
            running.set()
            told.append(stopped.wait(20) and given_up.wait(20))

    monkeypatch.setattr(module, "ThreadPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt), closing(in_order(work, (np.array([i]) for i in range(9)), 1)) as found:
        next(found)
        assert running.wait(30)
        raise KeyboardInterrupt
    assert begun == [0, 1] and told == [True]


@pytest.mark.timeout(60)
def test_an_error_in_a_thread_comes_out_at_its_place() -> None:
    def work(rows: np.ndarray, stopped: threading.Event) -> int:
        return 1 // int(rows[0] - 2)

    found = in_order(work, (np.array([i]) for i in range(9)), 2)
    assert [next(found)[1] for _ in range(2)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(found)
