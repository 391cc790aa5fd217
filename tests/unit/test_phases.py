from __future__ import annotations

import pytest
import torch

from partial_fc import phases
from partial_fc.phases import PhaseTimer

CPU = torch.device("cpu")


class Clock:
    """A clock that is moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(phases.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_phase_inside_another_is_not_counted_in_that(clock: Clock) -> None:
    timer = PhaseTimer(CPU)
    with timer.phase("head_forward"):
        clock.now += 1
        with timer.inside("collectives"):
            clock.now += 4
        clock.now += 2
        with timer.inside("collectives"):
            clock.now += 0.5
    with timer.phase("optimizer"):
        clock.now += 8
    timer.end_step()
    assert timer.read() == [{"head_forward": 3.0, "collectives": 4.5, "optimizer": 8.0}]
    assert timer.read() == []


def test_the_phases_of_a_step_add_up_to_it(clock: Clock) -> None:
    timer = PhaseTimer(CPU)
    for step in (1, 2):
        for name in ("data", "head_forward", "head_forward", "optimizer"):
            with timer.phase(name):
                clock.now += step
                with timer.inside("collectives"), timer.phase("odd"):
                    clock.now += 0.25
        timer.end_step()
    first, second = timer.read()
    assert sum(first.values()) == 4 * 1.25 and sum(second.values()) == 4 * 2.25
    assert first["collectives"] == 0 and first["odd"] == 1.0


def test_outside_of_a_phase_nothing_is_counted(clock: Clock) -> None:
    timer = PhaseTimer(CPU)
    with timer.inside("collectives"):
        clock.now += 5
    timer.end_step()
    assert timer.read() == [{}]


def test_only_outer_phases_are_told(clock: Clock) -> None:
    told: list[str] = []
    timer = PhaseTimer(CPU, entered=told.append)
    with timer.phase("head_backward"), timer.inside("collectives"):
        pass
    with timer.phase("optimizer"):
        pass
    assert told == ["head_backward", "optimizer"]


def test_after_an_error_in_a_phase_the_next_one_is_an_outer_one(clock: Clock) -> None:
    told: list[str] = []
    timer = PhaseTimer(CPU, entered=told.append)
    with pytest.raises(ZeroDivisionError), timer.phase("head_forward"), timer.inside("collectives"):
        raise ZeroDivisionError
    with timer.inside("collectives"):
        clock.now += 7
    with timer.phase("data"):
        clock.now += 1
    timer.end_step()
    assert timer.read() == [{"data": 1.0}] and told == ["head_forward", "data"]


class Event:
    """A device event whose time is the host's clock."""

    clock: Clock

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.time = -1.0

    def record(self) -> None:
        self.time = Event.clock.now

    def synchronize(self) -> None:
        assert self.time >= 0

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.time - self.time)


def test_on_a_gpu_events_are_counted_likewise(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    Event.clock = clock
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = PhaseTimer(torch.device("cuda"))
    with timer.phase("data"):
        clock.now += 2
    with timer.phase("head_forward"):
        clock.now += 1
        with timer.inside("collectives"):
            clock.now += 4
    timer.end_step()
    assert timer.read() == [{"data": 2.0, "head_forward": 1.0, "collectives": 4.0}]
