"""How numbers, times and foreign text are shown."""

from __future__ import annotations

import math
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.status.words import ago, duration, figure, moment, number, plain, ranks, size, sparkline, whole


@given(st.text(max_size=300))
def test_foreign_text_is_one_harmless_line(text: str) -> None:
    shown = plain(text)
    assert len(shown) <= 203
    assert not [sign for sign in shown if unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


def test_what_steers_a_terminal_is_replaced_and_letters_stay() -> None:
    assert plain("r\u00e9sum\u00e9 \u4eba \x1b[31mred\x1b]0;title\x07 \u202egnp") == (
        "r\u00e9sum\u00e9 \u4eba \ufffd[31mred\ufffd]0;title\ufffd \ufffdgnp"
    )
    assert plain("two\nlines\tand a tab") == "two lines and a tab"
    assert plain("x" * 300) == "x" * 200 + "..."


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-3, "0 ms"),
        (0.00034, "0.34 ms"),
        (0.34, "340 ms"),
        (0.9996, "1.0 s"),
        (3.21, "3.2 s"),
        (9.97, "10 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "2 h 0 min"),
        (18_730, "5 h 12 min"),
        (48 * 3600, "2 d 0 h"),
        (1e8, "1,157 d"),
        (1e11, "over 3,000 years"),
        (math.inf, "over 3,000 years"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_sizes_and_figures() -> None:
    assert [size(count) for count in (0, 1023, 1024, 1.5 * 2**20, 79.6 * 2**30, 1023.9 * 2**30, 2**60)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 MiB",
        "79.6 GiB",
        "1 TiB",
        "1024 PiB",
    ]
    assert [figure(value) for value in (0.00012345, 9.63612, 1234.5, -5e4, 1e12)] == [
        "0.0001234",
        "9.636",
        "1,234",
        "-50,000",
        "1e+12",
    ]


def test_times_are_local_with_the_day_where_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        noon = 1_790_000_000 - 1_790_000_000 % 86_400 + 3 * 3600  # 12:00 there
        assert moment(noon, noon) == "12:00:00"
        assert ago(noon - 90, noon) == "11:58:30, 90 s ago"
        assert ago(noon - 7200, noon) == "10:00, 2 h 0 min ago"
        assert moment(noon - 86_400, noon) == time.strftime("%Y-%m-%d 12:00", time.localtime(noon - 86_400))
        assert ago(noon + 5, noon) == "12:00:05, just now", "another machine's clock"
        assert ago(noon + 7200, noon) == "14:00, 2 h 0 min ahead of this clock"
        assert moment(1e300, noon) == moment(math.nan, noon) == "an unknown time"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("value", [None, "3", True, [], math.nan, math.inf, 10**400, -1.7e308])
def test_what_is_no_number(value: object) -> None:
    assert number(value) is None and whole(value) is None


def test_numbers_and_whole_ones() -> None:
    assert number(-2.5) == -2.5 and whole(7.0) == 7
    assert [whole(value) for value in (-1, 0.5, 2**63)] == [None, None, None]


def test_ranks_in_words() -> None:
    assert ranks([3]) == "rank 3" and ranks([1, 2]) == "ranks 1, 2"
    assert ranks(list(range(64))) == "ranks 0, 1, 2, 3, 4, 5 and 58 more"


def test_a_curve_shows_means_of_equal_parts() -> None:
    falling = [(step, 100.0 - step) for step in range(100)]
    assert sparkline(falling, 8) == "█▇▆▅▄▃▂▁"
    assert sparkline(reversed(falling), 8, unicode=False) == "#%*+=-._"
    assert sparkline([(0, 1.0), (1, 1.0), (90, 2.0)], 3) == "▁ █", "nothing was measured in between"
    assert sparkline([], 8) == "" and sparkline([(5, 1.0)], 8) == "▁"


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e300, 1e300)), max_size=50), st.integers(1, 40))
def test_a_curve_is_never_too_wide(points: list[tuple[float, float]], width: int) -> None:
    assert len(sparkline(points, width)) <= width
