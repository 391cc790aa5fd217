"""The divergence watch against the definition: a median of the losses that had not diverged."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.divergence import DivergenceWatch
from partial_fc.errors import ConfigError

LOSSES = st.lists(
    st.one_of(st.floats(-5, 50), st.sampled_from([0.0, 1.0, 1e300, math.nan, math.inf]), st.none()), max_size=120
)
WINDOWS = st.integers(1, 60)


def verdicts(losses: list[float | None], factor: float, window: int, limit: int) -> list[bool]:
    """What the definition says, written again with the statistics module."""
    kept: list[float] = []
    row = 0
    said = []
    for loss in losses:
        if loss is None or not math.isfinite(loss):
            row += 1
            said.append(row >= limit)
            continue
        row = 0
        seen = kept[-window:]
        enough = len(seen) >= min(max(window // 4, 10), window)
        diverged = enough and loss > factor * max(statistics.median(seen), 0.1)
        if not diverged:
            kept.append(loss)
        said.append(diverged)
    return said


@given(LOSSES, WINDOWS, st.floats(1.01, 8), st.integers(1, 5))
def test_verdicts_are_those_of_the_definition(
    losses: list[float | None], window: int, factor: float, limit: int
) -> None:
    watch = DivergenceWatch(factor, window=window, nonfinite_limit=limit)
    assert [watch.see(loss) is not None for loss in losses] == verdicts(losses, factor, window, limit)


@given(st.lists(st.floats(0.5, 3), min_size=1, max_size=80), WINDOWS)
def test_median_is_that_of_the_statistics_module(losses: list[float], window: int) -> None:
    watch = DivergenceWatch(100.0, window=window)
    for number, loss in enumerate(losses, 1):
        assert watch.see(loss) is None
        expected = statistics.median(losses[max(number - window, 0) : number])
        if min(number, window) >= min(max(window // 4, 10), window):
            assert watch.median == pytest.approx(expected, rel=1e-15)
        else:
            assert watch.median is None


@given(LOSSES, LOSSES, WINDOWS)
def test_resumes_exactly_from_json(before: list[float | None], after: list[float | None], window: int) -> None:
    watch = DivergenceWatch(2.0, window=window, nonfinite_limit=3)
    for loss in before:
        watch.see(loss)
    resumed = DivergenceWatch(2.0, window=window, nonfinite_limit=3)
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict(), allow_nan=False)))
    assert [resumed.see(loss) for loss in after] == [watch.see(loss) for loss in after]
    assert resumed.state_dict() == watch.state_dict()


def test_a_shorter_window_goes_on_with_the_last_losses() -> None:
    watch = DivergenceWatch(2.0, window=20)
    for loss in range(1, 21):
        watch.see(float(loss))
    shorter = DivergenceWatch(2.0, window=10)
    shorter.load_state_dict(watch.state_dict())
    assert shorter.state_dict()["losses"] == [float(loss) for loss in range(11, 21)]


def test_a_diverged_loss_is_named_and_leaves_the_bound_where_it_was() -> None:
    watch = DivergenceWatch(3.0)
    for _ in range(25):
        assert watch.see(2.0) is None
    for _ in range(50):
        reason = watch.see(7.0)
        assert reason == "the loss is 7, more than 3 times 2 (the median of the last 25 was 2)"
    assert watch.see(5.9) is None


@pytest.mark.parametrize("level", [0.0, -4.0, 1e-6])
def test_a_median_near_zero_or_below_is_no_reason(level: float) -> None:
    watch = DivergenceWatch(3.0, window=20)
    for _ in range(20):
        assert watch.see(level) is None
    assert watch.see(0.2) is None
    assert watch.see(0.4) is not None


def test_steps_without_an_update_in_a_row() -> None:
    watch = DivergenceWatch(None, nonfinite_limit=3)
    assert watch.see(1e30) is None and watch.see(0.1) is None
    assert [watch.see(loss) is None for loss in (None, math.nan, 1.0, math.inf, None)] == [True] * 5
    assert "3 steps in a row had no update" in str(watch.see(-math.inf))
    watch.reset()
    assert watch.see(None) is None
    assert watch.state_dict() == {"losses": [], "without_update": 1}


@pytest.mark.parametrize(
    ("factor", "options", "message"),
    [
        (1.0, {}, "factor is 1.0, expected more than 1"),
        (math.nan, {}, "factor is nan, expected more than 1"),
        (2.0, {"window": 0}, "window is 0, expected a positive number"),
        (2.0, {"nonfinite_limit": 0}, "nonfinite_limit is 0"),
        (2.0, {"floor": 0.0}, "floor is 0.0"),
    ],
)
def test_bad_arguments(factor: float, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DivergenceWatch(factor, **options)  # type: ignore[arg-type]


def test_it_is_in_trouble_until_a_step_is_good_again() -> None:
    watch = DivergenceWatch(3.0, window=10)
    for loss in [1.0] * 12:
        watch.see(loss)
    assert not watch.in_trouble
    for bad in (None, math.nan, 50.0):
        watch.see(bad)
        assert watch.in_trouble
        watch.see(1.0)
        assert not watch.in_trouble
    watch.see(50.0)
    watch.reset()
    assert not watch.in_trouble
