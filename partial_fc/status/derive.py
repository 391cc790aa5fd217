"""What follows from a run's files and the answers of its ranks: functions of these, which read nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from partial_fc.status.facts import EXIT_CODES, Evaluation, Facts, Imbalance, Loss, Rank, Waiting
from partial_fc.status.following import FollowedJournal
from partial_fc.status.scrape import Answer
from partial_fc.status.words import number, plain, ranks, whole

SAID = ("running", "resume", "finished", "failed")
# Lines of these last seconds tell the speed; of these the pace, evaluations and commits included.
_SPEED_SECONDS, _PACE_SECONDS = 300.0, 3600.0
# A run isn't taken for dead before it has been quiet for so long; nor before its first line.
_QUIET_SECONDS, _STARTING_SECONDS = 60.0, 900.0
_LAST_LINES = 40  # whose losses tell a trend
_CURVE = 200
# What a step spends in these depends on the other ranks.
_OF_ALL_RANKS = ("collectives", "backbone_backward")
# What only the endpoints tell, of rank 0.
_TOLD = ("support_vector_share", "positive_classes", "loss_scale")
_NO_FIGURES = ("step", "seconds", "samples", "samples_per_second", "loss")


def fill_place(
    facts: Facts,
    status: Mapping[str, Any],
    config: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    answers: Sequence[Answer],
) -> None:
    """Where the run stands.

    Args:
        facts: gets it.
        status: ``status.json``.
        config: ``config.yaml``.
        lines: those of steps since the run last went on or back.
        answers: of the ranks.
    """
    section = config.get("train")
    train = section if isinstance(section, Mapping) else {}
    last = lines[-1] if lines else {}
    name = status.get("name", train.get("name"))
    facts.name = plain(name) if isinstance(name, str) else None
    facts.batch_size = whole(train.get("batch_size"))
    facts.samples = whole(last.get("samples"))
    steps = [whole(status.get("step")), whole(last.get("step")), *(_reached(answer) for answer in answers)]
    facts.step = max((step for step in steps if step is not None), default=None)
    planned = [status.get("steps"), train.get("steps"), *(answer.get("planned_steps") for answer in answers)]
    facts.planned_steps = next((found for one in planned if (found := whole(one)) is not None), None)
    worlds = [status.get("world_size"), *(answer.get("world_size") for answer in answers)]
    facts.world_size = next((found for one in worlds if (found := whole(one)) is not None), None)
    facts.epoch = max((epoch for answer in answers if (epoch := answer.get("epoch")) is not None), default=None)


def _reached(answer: Answer) -> int | None:
    return whole(answer.get("reached_step"))


def fill_figures(facts: Facts, journal: FollowedJournal, answers: Sequence[Answer]) -> None:
    """What the journal says of steps and evaluations, and an endpoint beside it."""
    lines = journal.steps()
    facts.trained_seconds = journal.seconds if lines else None
    facts.loss = _loss(lines)
    for line in journal.evaluations:
        name, accuracy = line.get("set"), number(line.get("accuracy"))
        if not isinstance(name, str) or accuracy is None:
            continue
        name, step, before = plain(name, 60), line["step"], facts.evaluations.get(plain(name, 60))
        best = (accuracy, step) if before is None or accuracy > before.best else (before.best, before.best_step)
        facts.evaluations[name] = Evaluation(accuracy, step, *best)
        facts.evaluation_seconds = number(line.get("evaluation_seconds"))
    if not lines:
        return
    last = lines[-1]
    phases = _numbers(last.get("phase_seconds"))
    facts.phase_seconds = {phase: seconds for phase, seconds in phases.items() if seconds >= 0}
    facts.learning_rate = _numbers(last.get("learning_rate"))
    facts.figures = _numbers({key: value for key, value in last.items() if key not in _NO_FIGURES})
    for answer in answers:
        if answer.rank == 0:
            told = {name: answer.get(name) for name in _TOLD}
            told["gradient_norm"] = answer.get("gradient_norm", "backbone")
            facts.figures |= {name: value for name, value in told.items() if value is not None}


def _numbers(found: Any) -> dict[str, float]:
    if not isinstance(found, Mapping):
        return {}
    values = {plain(name, 60): number(value) for name, value in found.items()}
    return {name: value for name, value in values.items() if value is not None}


def _loss(lines: Sequence[Mapping[str, Any]]) -> Loss:
    points = [(line["step"], loss) for line in lines if (loss := number(line.get("loss"))) is not None]
    found = Loss(number(lines[-1].get("loss")) if lines else None)
    found.curve = [points[round(at)] for at in _spread(len(points), _CURVE)]
    last = points[-_LAST_LINES:]
    if len(last) >= 8:
        half = len(last) // 2
        earlier, later = [value for _, value in last[:half]], [value for _, value in last[half:]]
        found.change = statistics.fmean(later) - statistics.fmean(earlier)
        # Twice the standard error of the difference: what scatter alone seldom makes.
        noise = 2 * math.hypot(*(statistics.stdev(half) / math.sqrt(len(half)) for half in (earlier, later)))
        found.trend = "level" if abs(found.change) <= noise else "falling" if found.change < 0 else "rising"
        found.over_steps = last[-1][0] - last[0][0]
    return found


def _spread(count: int, most: int) -> list[float]:
    if count <= most:
        return [float(at) for at in range(count)]
    return [at * (count - 1) / (most - 1) for at in range(most)]


def fill_faults(facts: Facts, journal: FollowedJournal, answers: Sequence[Answer], waiting: list[Waiting]) -> None:
    """What went wrong.

    Args:
        facts: gets it.
        journal: of the run.
        answers: of the ranks.
        waiting: what ranks without progress wrote.
    """
    faults = facts.faults
    faults.restarts, faults.rollbacks, faults.skipped_steps = journal.restarts, journal.rollbacks, journal.skipped
    if journal.last_rollback is not None:
        faults.rollback_step = journal.last_rollback["step"]
    if journal.last_skipped is not None:
        faults.skipped_step, reason = journal.last_skipped["step"], journal.last_skipped.get("reason")
        faults.skipped_reason = plain(reason) if isinstance(reason, str) else None
    for answer in answers:
        for kind, count in answer.by_label("decode_errors_total").items():
            if count > 0:
                kind = plain(kind, 60)
                faults.decode_errors[kind] = faults.decode_errors.get(kind, 0) + int(count)
    faults.stalled_ranks = [answer.rank for answer in answers if answer.get("stalled") == 1]
    faults.waiting = waiting


def fill_ranks(facts: Facts, answers: Sequence[Answer], before: Mapping[int, Answer]) -> None:
    """What each rank says of itself, and whether one keeps the others waiting.

    Args:
        facts: gets it.
        answers: of the ranks.
        before: those of the last look, by rank: what was since then tells of now.
    """
    for answer in answers:
        facts.ranks.append(
            Rank(
                answer.rank,
                answer.address,
                answer.values is not None,
                answer.problem,
                step=_reached(answer),
                stalled=answer.get("stalled") == 1,
                queue=whole(answer.get("data_queue_batches")),
                queue_capacity=whole(answer.get("data_queue_capacity")),
                resident_bytes=whole(answer.get("process_resident_memory_bytes")),
                gpu_bytes=whole(answer.get("gpu_memory_bytes", "reserved")),
                gpu_peak_bytes=whole(answer.get("gpu_memory_bytes", "peak")),
                host_available_bytes=whole(answer.get("host_memory_available_bytes")),
                phase_seconds=_phases(answer, before.get(answer.rank)),
            )
        )
    facts.imbalance = _imbalance(facts.ranks)


def _phases(answer: Answer, before: Answer | None) -> dict[str, float]:
    found = {}
    for phase, total in answer.by_label("step_seconds_sum").items():
        count = answer.get("step_seconds_count", phase) or 0.0
        earlier = 0.0 if before is None else before.get("step_seconds_count", phase) or 0.0
        if before is not None and 0 < earlier < count:
            seconds = (total - (before.get("step_seconds_sum", phase) or 0.0)) / (count - earlier)
        else:
            seconds = total / count if count else 0.0
        if count and (known := number(seconds)) is not None:
            found[plain(phase, 60)] = max(known, 0.0)
    return found


def _imbalance(found: Sequence[Rank]) -> Imbalance | None:
    living = [rank for rank in found if rank.phase_seconds]
    if len(living) < 2:
        return None
    step = statistics.median(sum(rank.phase_seconds.values()) for rank in living)
    worst: Imbalance | None = None
    for phase in living[0].phase_seconds:
        if phase in _OF_ALL_RANKS:
            continue
        slowest = max(living, key=lambda rank: rank.phase_seconds.get(phase, 0.0))
        seconds = slowest.phase_seconds.get(phase, 0.0)
        median = statistics.median(rank.phase_seconds.get(phase, 0.0) for rank in living)
        if seconds - median > 0.1 * step and (worst is None or seconds - median > worst.seconds - worst.median_seconds):
            worst = Imbalance(slowest.rank, phase, seconds, median)
    return worst


def quiet_limit(facts: Facts, lines: Sequence[Mapping[str, Any]]) -> float:
    """Seconds without a word after which a run isn't taken for a living one any more.

    Args:
        facts: with evaluations and commits.
        lines: those of steps since the run last went on or back.
    """
    times = [time for line in lines[-50:] if (time := number(line.get("seconds"))) is not None]
    if len(times) < 2:
        return _STARTING_SECONDS
    longest = max(after - before for before, after in zip(times, times[1:], strict=False))
    between = (facts.evaluation_seconds or 0.0) + (facts.commits.seconds or 0.0)
    # At its end an evaluation comes, and the model is written, which may not have happened before.
    ending = facts.step is not None and facts.planned_steps is not None and facts.step >= facts.planned_steps
    return max(_STARTING_SECONDS if ending else _QUIET_SECONDS, 3 * (longest + between))


def fill_state(
    facts: Facts, status: Mapping[str, Any], quiet: float, answers: Sequence[Answer], holder: int | None, now: float
) -> None:
    """The state in a word, and what it is told by.

    Args:
        facts: gets it.
        status: ``status.json``.
        quiet: seconds without a word after which a run that nothing else shows to live isn't taken for a living one.
        answers: of the ranks.
        holder: the process that holds the run's lock on this machine.
        now: Unix time.
    """
    said, reason = status.get("state"), status.get("reason")
    facts.reason = plain(reason, 1000) if said == "failed" and reason is not None else None
    if said in SAID and said != "running":
        facts.state = said
    else:
        facts.state, facts.signs = _life(facts, said == "running", quiet, answers, holder, now)
    facts.exit_code = EXIT_CODES[facts.state]


def _life(
    facts: Facts, said: bool, quiet: float, answers: Sequence[Answer], holder: int | None, now: float
) -> tuple[str, str]:
    up = sum(answer.values is not None for answer in answers)
    asked = f"{up} of {len(answers)} endpoints answer{'s' if up == 1 else ''}" if answers else "no endpoint was asked"
    if facts.faults.stalled_ranks:
        return "stalled", f"{ranks(facts.faults.stalled_ranks)} makes no progress"
    if up:
        return "running", asked
    if holder is not None:
        return "running", f"process {holder} of this machine writes it; {asked}"
    if said and facts.updated is not None and -quiet < now - facts.updated < quiet:
        return "running", asked
    return "silent" if said else "unknown", asked


def fill_speed(facts: Facts, lines: Sequence[Mapping[str, Any]], now: float) -> None:
    """How fast it goes, and what is left at that pace.

    Args:
        facts: gets it; with its place and state.
        lines: those of steps since the run last went on or back.
        now: Unix time.
    """
    timed = [(seconds, line) for line in lines if (seconds := number(line.get("seconds"))) is not None]
    if not timed:
        return
    end, last = timed[-1]
    speeds = [number(line.get("samples_per_second")) for seconds, line in timed if end - seconds <= _SPEED_SECONDS]
    known = [speed for speed in speeds if speed is not None and speed > 0]
    facts.images_per_second = statistics.median(known) if known else None
    begin, first = next((seconds, line) for seconds, line in timed if end - seconds <= _PACE_SECONDS)
    if last["step"] > first["step"] and end > begin:
        facts.seconds_a_step = (end - begin) / (last["step"] - first["step"])
    elif facts.images_per_second and facts.batch_size:
        facts.seconds_a_step = number(facts.batch_size / facts.images_per_second)
    if facts.seconds_a_step is None or facts.step is None or facts.planned_steps is None:
        return
    if facts.state in ("running", "resume"):
        facts.remaining_seconds = max(0, facts.planned_steps - facts.step) * facts.seconds_a_step
