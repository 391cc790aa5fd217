"""Curves of a run, as Prometheus has them, on one picture.

    python benchmarks/run_curves.py --run omniglot --prometheus http://127.0.0.1:9090 --output docs/run_curves.png

The run may be under way, or have ended: what the server still has of it is drawn (``--hours`` back at most). Needs
matplotlib (the extra ``plot``) and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from partial_fc.metrics import PHASES

POINTS = 400
GREY, BLUE, ORANGE, GREEN = "#777777", "#1f6fb2", "#d95f02", "#3a8f4a"
COLOURS = ("#c9a227", "#1f6fb2", "#d95f02", "#f2a66b", "#7fb0dc", "#3a8f4a", "#9a9a9a")


class Curve(NamedTuple):
    """A series: its labels, and its times (Unix seconds) with values."""

    labels: dict[str, str]
    times: list[float]
    values: list[float]


class Source:
    """Asks a Prometheus for a run's curves.

    Args:
        url: of the server.
        run: value of the label ``run``.
        hours: how far back the run is looked for.

    Raises:
        SystemExit: the server isn't there, or has nothing of the run.
    """

    def __init__(self, url: str, run: str, hours: float) -> None:
        self._url, self._run = url.rstrip("/"), run
        end = time.time()
        self._range = (end - hours * 3600, end, hours * 3600 / 5000)
        seen = self.curves("max by (run) (partial_fc_reached_step{RUN})")
        if not seen:
            sys.exit(f"{url} has no figures of a run {run!r} in the last {hours:g} h: {self._known()}")
        first, last = seen[0].times[0], seen[0].times[-1]
        self.begin = first
        self._range = (first, last, max((last - first) / POINTS, 1.0))

    def curves(self, expression: str) -> list[Curve]:
        """The series of an expression over the run. ``{RUN}`` is the run's selector, ``WINDOW`` a window for rates."""
        begin, end, step = self._range
        text = expression.replace("{RUN", f'{{run="{self._run}"').replace("WINDOW", f"{max(4 * step, 60):.0f}s")
        found = self._ask("query_range", query=text, start=f"{begin}", end=f"{end}", step=f"{step}")["result"]
        curves = []
        for series in found:
            points = [(at, float(value)) for at, value in series["values"] if math.isfinite(float(value))]
            if points:
                curves.append(Curve(series["metric"], [at for at, _ in points], [value for _, value in points]))
        return sorted(curves, key=lambda curve: sorted(curve.labels.items()))

    def _known(self) -> str:
        begin, end, _ = self._range
        names = self._ask("label/run/values", start=f"{begin}", end=f"{end}")
        return f"it knows {', '.join(names)}" if names else "it knows no run; are its targets up?"

    def _ask(self, path: str, **parameters: str) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            sys.exit(f"{self._url} refuses {parameters.get('query', path)}: {error.read().decode()}")
        except OSError as error:
            sys.exit(f"{self._url} doesn't answer ({error}): expected a Prometheus; give its address with --prometheus")


class Plot(NamedTuple):
    """One of the picture's plots.

    Attributes:
        title: with the unit.
        queries: expression, and the name of a curve by its labels.
        zero: whether the axis begins at 0.
        stacked: whether curves lie on each other.
        stepped: whether a value holds until the next.
    """

    title: str
    queries: tuple[tuple[str, Callable[[dict[str, str]], str]], ...]
    zero: bool = False
    stacked: bool = False
    stepped: bool = False


def _always(name: str) -> Callable[[dict[str, str]], str]:
    return lambda labels: name


PLOTS = (
    Plot("loss", (("max(partial_fc_loss{RUN})", _always("loss")),)),
    Plot(
        "verification accuracy",
        (("max by (set) (partial_fc_verification_accuracy{RUN})", lambda labels: labels["set"]),),
        stepped=True,
    ),
    Plot(
        "cosine with class centres",
        (
            ("max(partial_fc_target_cosine{RUN})", _always("own")),
            ("max by (nearest) (partial_fc_nearest_cosine{RUN})", lambda labels: f"other, nearest {labels['nearest']}"),
        ),
    ),
    Plot("images a second", (("sum(rate(partial_fc_samples_total{RUN}[WINDOW]))", _always("all ranks")),), zero=True),
    Plot(
        "time of a step by phase, s (mean over the ranks)",
        (
            (
                "avg by (phase) (rate(partial_fc_step_seconds_sum{RUN}[WINDOW]) "
                "/ on (run, rank) group_left () rate(partial_fc_steps_total{RUN}[WINDOW]))",
                lambda labels: labels["phase"],
            ),
        ),
        zero=True,
        stacked=True,
    ),
    Plot(
        "support vectors a sample",
        (("max(partial_fc_support_vectors_per_sample{RUN})", _always("mean of the batch")),),
        zero=True,
    ),
    Plot(
        "share of samples",
        (
            ("max(partial_fc_support_vector_share{RUN})", _always("with a support vector")),
            ("max(partial_fc_nearest_accuracy{RUN})", _always("nearest to their own centre")),
        ),
        zero=True,
    ),
    Plot(
        "learning rate",
        (("max by (group) (partial_fc_learning_rate{RUN})", lambda labels: labels["group"]),),
        zero=True,
    ),
    Plot(
        "since the last commit, s",
        (
            (
                "time() - max((partial_fc_commit_timestamp_seconds{RUN} > 0) "
                'or process_start_time_seconds{RUN, job="partial_fc"})',
                _always("what a crash would lose"),
            ),
        ),
        zero=True,
    ),
)


def draw(source: Source, title: str, output: Path) -> None:
    """Draw all plots into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(3, 3, figsize=(13, 9), sharex=True, constrained_layout=True)
    for axes, plot in zip(grid.flat, PLOTS, strict=True):
        axes.set_title(plot.title, fontsize=10, loc="left")
        axes.grid(alpha=0.25, linewidth=0.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        curves = [(name(curve.labels), curve) for query, name in plot.queries for curve in source.curves(query)]
        if plot.stacked:
            _stack(axes, curves, source.begin)
        else:
            _lines(axes, curves, source.begin, stepped=plot.stepped)
        if plot.zero:
            axes.set_ylim(bottom=0)
        # A run that has no evaluation yet has no name to show, either.
        if len(curves) > 1 or (curves and plot.stepped):
            axes.legend(fontsize=7, frameon=False)
    for axes in grid[-1]:
        axes.set_xlabel("minutes")
    figure.suptitle(title, fontsize=11)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def _lines(axes: Any, curves: Sequence[tuple[str, Curve]], begin: float, *, stepped: bool) -> None:
    for (name, curve), colour in zip(curves, (BLUE, ORANGE, GREEN, GREY, *COLOURS), strict=False):
        minutes = [(at - begin) / 60 for at in curve.times]
        style = "steps-post" if stepped else "default"
        axes.plot(minutes, curve.values, label=name, color=colour, linewidth=1.2, drawstyle=style)


def _stack(axes: Any, curves: Sequence[tuple[str, Curve]], begin: float) -> None:
    by_phase = dict(curves)
    times = sorted({at for curve in by_phase.values() for at in curve.times})
    layers = []
    for phase in PHASES:
        known = dict(zip(by_phase[phase].times, by_phase[phase].values, strict=True)) if phase in by_phase else {}
        layers.append([known.get(at, 0.0) for at in times])
    axes.stackplot([(at - begin) / 60 for at in times], layers, labels=PHASES, colors=COLOURS, linewidth=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="name of the run, as in the label run")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="address of the server")
    parser.add_argument("--hours", type=float, default=24.0, help="how far back to look (default: 24)")
    parser.add_argument("--title", help="of the picture (default: the run)")
    parser.add_argument("--output", type=Path, default=Path("run_curves.png"), help="the PNG")
    arguments = parser.parse_args()
    source = Source(arguments.prometheus, arguments.run, arguments.hours)
    draw(source, arguments.title or arguments.run, arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
