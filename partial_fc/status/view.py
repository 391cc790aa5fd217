"""A run's facts as a screen of lines, from 80 columns on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from partial_fc.status.facts import Facts
from partial_fc.status.tables import STYLES, Screen, ranks_table, silent_ranks, state_words
from partial_fc.status.words import ago, duration, figure, moment, plain, size, sparkline

_LABEL_WIDTH = 12
_PHASE_STYLES = ("cyan", "blue", "magenta", "bright_magenta", "bright_blue", "green", "yellow")
_DIM = "dim"
_WORDS = {"target_cosine": "target", "nearest_cosine_1": "nearest other class", "nearest_cosine_5": "fifth nearest"}


def draw(facts: Facts, now: float, screen: Screen) -> RenderableType:
    """A run.

    Args:
        facts: of it.
        now: Unix time.
        screen: what it is drawn on.
    """
    grid = Table.grid(padding=(0, 1, 0, 0), expand=False)
    grid.add_column(width=_LABEL_WIDTH - 1, no_wrap=True, style=_DIM)
    grid.add_column(overflow="fold", max_width=max(screen.width - _LABEL_WIDTH, 20))
    for label, value in _lines(facts, now, screen):
        grid.add_row(label, value)
    parts: list[RenderableType] = [_title(facts, screen), grid]
    if facts.ranks:
        parts += [Text(), ranks_table(facts, screen), *silent_ranks(facts)]
    parts += [Text(f"note: {plain(note, 400)}", style="yellow") for note in facts.notes]
    return Group(*parts)


def _title(facts: Facts, screen: Screen) -> Text:
    title = Text()
    title.append(facts.name or "a run", style="bold")
    title.append("  ")
    title.append(state_words(facts), style=STYLES[facts.state])
    folder = plain(facts.folder, 400)
    free = screen.width - title.cell_len - len(folder)
    title.append(" " * free if free >= 2 else "\n")
    title.append(folder, style=_DIM)
    return title


def _lines(facts: Facts, now: float, screen: Screen) -> Iterator[tuple[str, Text]]:
    yield from _state_lines(facts, now)
    yield from _progress_lines(facts, now, screen)
    yield from _time_lines(facts, screen)
    yield from _learning_lines(facts, screen)
    yield from _evaluation_lines(facts, screen)
    yield from _commit_lines(facts, now, screen)
    yield from _fault_lines(facts, now, screen)


def _state_lines(facts: Facts, now: float) -> Iterator[tuple[str, Text]]:
    if facts.reason is not None:
        yield "reason", Text(facts.reason, style="red")
    if facts.state == "resume":
        yield "next", Text("start the same command again: it goes on from the last commit")
    if facts.state == "silent" and facts.updated is not None:
        written = f"status.json says running; last written {ago(facts.updated, now)}; {facts.signs}"
        yield "since", Text(written, style="red")
    elif facts.state in ("stalled", "unknown") and facts.signs:
        yield "signs", Text(facts.signs)
    elif facts.updated is not None:
        text = Text(f"written {ago(facts.updated, now)}")
        if facts.signs and facts.ranks:
            text.append(f"; {facts.signs}")
        yield "signs", text


def _progress_lines(facts: Facts, now: float, screen: Screen) -> Iterator[tuple[str, Text]]:
    if facts.step is not None:
        text = Text(f"step {facts.step:,}")
        if facts.planned_steps:
            share = min(facts.step / facts.planned_steps, 1.0)
            text.append(f" of {facts.planned_steps:,}  ")
            _append_bar(text, share, min(40, max(10, screen.width - 62)), screen)
            # Rounded down: 100 % is the end.
            text.append(f"  {int(1000 * share) / 10:.1f} %")
        if facts.epoch is not None:
            text.append(f"  epoch {facts.epoch:.2f}")
        yield "progress", text
    parts = []
    if facts.images_per_second is not None:
        parts.append(f"{figure(facts.images_per_second)} images/s")
    if facts.seconds_a_step is not None:
        parts.append(f"{duration(facts.seconds_a_step)} a step, all counted")
    if facts.world_size is not None:
        parts.append(f"{facts.world_size} rank{'s' if facts.world_size > 1 else ''}")
    if facts.trained_seconds is not None:
        parts.append(f"{duration(facts.trained_seconds)} so far")
    if parts:
        yield "speed", _flow(parts, screen)
    if facts.state in ("running", "stalled"):
        left = facts.remaining_seconds
        at_pace = "" if left is None else f"{duration(left)}, until {moment(now + left, now)} at this pace"
        yield "left", Text(at_pace or "unknown")
    elif facts.state == "resume" and facts.remaining_seconds is not None:
        yield "left", Text(f"{duration(facts.remaining_seconds)} at its pace")


def _append_bar(text: Text, share: float, width: int, screen: Screen) -> None:
    full = int(share * width)
    signs = ("━", "─") if screen.unicode else ("#", "-")
    text.append(signs[0] * full, style="green")
    text.append(signs[1] * (width - full), style=_DIM)


def _flow(parts: Sequence[str | Text], screen: Screen) -> Text:
    """Parts one behind the other, with a line's end between parts only, where they fit a line at all."""
    between = " · " if screen.unicode else ", "
    text, used, room = Text(), 0, screen.width - _LABEL_WIDTH
    for part in parts:
        part = Text(part) if isinstance(part, str) else part
        if used and used + len(between) + part.cell_len > room:
            text.append("\n")
            used = 0
        elif used:
            text.append(between)
            used += len(between)
        text.append(part)
        used += part.cell_len
    return text


def _time_lines(facts: Facts, screen: Screen) -> Iterator[tuple[str, Text]]:
    total = sum(facts.phase_seconds.values())
    if total <= 0:
        return
    text = Text()
    if screen.colour and screen.unicode:
        width = min(screen.width - _LABEL_WIDTH - 1, 66)
        for number, (_, begin, end) in enumerate(_stretches(facts.phase_seconds, total, width)):
            text.append("█" * (end - begin), style=_PHASE_STYLES[number % len(_PHASE_STYLES)])
        text.append("\n")
    parts = []
    for number, (phase, seconds) in enumerate(facts.phase_seconds.items()):
        words = f"{phase.replace('_', ' ')} {duration(seconds)} ({100 * seconds / total:.0f} %)"
        parts.append(Text(words, style=_PHASE_STYLES[number % len(_PHASE_STYLES)]))
    text.append(_flow(parts, screen))
    yield "a step", text


def _stretches(phases: dict[str, float], total: float, width: int) -> Iterator[tuple[str, int, int]]:
    """Where each phase begins and ends in a bar."""
    done = 0.0
    for phase, seconds in phases.items():
        begin, done = done, done + seconds
        yield phase, round(begin / total * width), round(done / total * width)


def _learning_lines(facts: Facts, screen: Screen) -> Iterator[tuple[str, Text]]:
    loss, figures = facts.loss, dict(facts.figures)
    norm, scale = figures.pop("gradient_norm", None), figures.pop("loss_scale", None)
    if loss.curve or loss.last is not None:
        text = Text()
        curve = sparkline(loss.curve, min(40, max(10, screen.width - 56)), unicode=screen.unicode)
        if len(curve) > 1:
            text.append(curve, style="cyan")
            text.append("  ")
        text.append("none: the last step was skipped" if loss.last is None else figure(loss.last), style="bold")
        if loss.trend is not None and loss.change is not None:
            amount = "" if loss.trend == "level" else f" by {figure(abs(loss.change))}"
            text.append(f", {loss.trend}{amount} in {loss.over_steps:,} steps")
        yield "loss", text
    cosines = [f"{words} {figures.pop(name):.3f}" for name, words in _WORDS.items() if name in figures]
    if (accuracy := figures.pop("nearest_accuracy", None)) is not None:
        cosines.append(f"own class nearest {100 * accuracy:.0f} %")
    if cosines:
        yield "cosine", _flow(cosines, screen)
    head = []
    if (count := figures.pop("support_vectors_per_sample", None)) is not None:
        head.append(f"{figure(count)} support vectors a sample")
    if (share := figures.pop("support_vector_share", None)) is not None:
        head.append(f"{100 * share:.0f} % of samples have one")
    if (classes := figures.pop("sampled_classes", None)) is not None:
        head.append(f"{classes:,.0f} classes of rank 0 sampled")
    if (positive := figures.pop("positive_classes", None)) is not None:
        head.append(f"{positive:,.0f} positive")
    head += [f"{name.replace('_', ' ')} {figure(value)}" for name, value in figures.items()]
    if head:
        yield "head", _flow(head, screen)
    rates = [f"{group} {figure(rate)}" for group, rate in facts.learning_rate.items()]
    rates += [] if norm is None else [f"gradient norm {figure(norm)}"]
    rates += [] if scale in (None, 1.0) else [f"loss scale {figure(scale)}"]
    if rates:
        yield "rate", _flow(rates, screen)


def _evaluation_lines(facts: Facts, screen: Screen) -> Iterator[tuple[str, Text]]:
    label = "evaluation"
    for name, found in facts.evaluations.items():
        text = Text(f"{name} ")
        text.append(f"{found.accuracy:.4f}", style="bold")
        text.append(f" at step {found.step:,}")
        best = found.best_step == found.step
        yield (
            label,
            _flow([text, "the best so far" if best else f"best {found.best:.4f} at step {found.best_step:,}"], screen),
        )
        label = ""


def _commit_lines(facts: Facts, now: float, screen: Screen) -> Iterator[tuple[str, Text]]:
    commits, parts = facts.commits, list[str | Text]()
    parts.append("none yet" if commits.step is None else f"step {commits.step:,}")
    if commits.at is not None:
        parts.append(ago(commits.at, now))
    if commits.bytes is not None:
        parts.append(size(commits.bytes))
    if commits.seconds is not None:
        parts.append(f"written in {duration(commits.seconds)}")
    if commits.copy_seconds is not None:
        parts.append(f"steps waited {duration(commits.copy_seconds)}")
    if commits.failed:
        parts.append(Text(f"{commits.failed} failed", style="bold red"))
    yield "commit", _flow(parts, screen)


def _fault_lines(facts: Facts, now: float, screen: Screen) -> Iterator[tuple[str, Text]]:
    faults, parts = facts.faults, []
    if faults.restarts:
        parts.append(f"went on {faults.restarts} time{'s' if faults.restarts > 1 else ''}")
    if faults.rollbacks:
        parts.append(f"rolled back {faults.rollbacks}, last to step {faults.rollback_step:,}")
    if faults.skipped_steps:
        reason = f" ({faults.skipped_reason})" if faults.skipped_reason else ""
        parts.append(f"skipped steps {faults.skipped_steps}, last {faults.skipped_step:,}{reason}")
    if faults.decode_errors:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(faults.decode_errors.items()))
        parts.append(f"unreadable samples: {kinds}")
    yield "faults", _flow([Text(part, style="yellow") for part in parts] or ["none"], screen)
    stalled = facts.state == "stalled"
    # Of a stall that is over only the last word.
    for waiting in faults.waiting[: 3 if stalled else 1]:
        text = f"rank {waiting.rank} at {ago(waiting.at, now)}: {waiting.text}"
        yield "stall" if stalled else "last stall", Text(text, style="red" if stalled else "")
    if facts.imbalance is not None:
        found = facts.imbalance
        yield (
            "imbalance",
            Text(
                f"rank {found.rank} spends {duration(found.seconds)} a step in {found.phase.replace('_', ' ')}, the "
                f"median is {duration(found.median_seconds)}",
                style="yellow",
            ),
        )
