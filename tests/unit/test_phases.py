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


class Device:
    """A GPU's queue beside the host's clock: work begins when it's given, or when the work before it is done."""

    def __init__(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.busy_until = clock, 0.0

        class Event:
            def __init__(event, enable_timing: bool) -> None:
                assert enable_timing
                event.time = -1.0

            def record(event) -> None:
                event.time = self.busy_until = max(self.busy_until, clock.now)

            def synchronize(event) -> None:
                assert event.time >= 0

            def elapsed_time(event, other: Event) -> float:
                return 1000 * (other.time - event.time)

        monkeypatch.setattr(torch.cuda, "Event", Event)

    def work(self, seconds: float) -> None:
        """Give it work; the host goes on."""
        self.busy_until = max(self.busy_until, self.clock.now) + seconds


@pytest.fixture
def device(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(clock, monkeypatch)


def test_on_a_gpu_its_own_time_is_counted(clock: Clock, device: Device) -> None:
    timer = PhaseTimer(torch.device("cuda"))
    with timer.phase("head_forward"):
        device.work(1)
        with timer.inside("collectives"):
            device.work(4)
        device.work(2)
    timer.end_step()
    (step,) = timer.read()
    assert step == pytest.approx({"head_forward": 3.0, "collectives": 4.0})


@pytest.mark.parametrize("loader", [0.9, 1.0, 1.05, 2.0])
def test_waiting_for_data_is_what_the_gpu_waits_and_the_phases_add_up(
    clock: Clock, device: Device, loader: float
) -> None:
    timer = PhaseTimer(torch.device("cuda"))
    ends, ready = [], clock.now
    for _ in range(40):
        with timer.phase("data"):
            ready += loader
            clock.now = max(clock.now, ready)
        with timer.phase("backbone_forward"):
            device.work(0.4)
        forward = device.busy_until
        with timer.phase("backbone_backward"):
            device.work(0.6)
        clock.now = max(clock.now, forward)
        timer.end_step()
        ends.append(device.busy_until)
    period, last = ends[-1] - ends[-2], timer.read()[-1]
    assert sum(last.values()) == pytest.approx(period)
    assert last["data"] == pytest.approx(max(loader - 1.0, 0.0), abs=1e-6)
