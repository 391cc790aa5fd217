"""The report of a run: a page of Markdown with a table and a picture, made from ``metrics.jsonl`` and an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partial_fc.evaluate import VerificationResult
from partial_fc.journal import read_journal

_BLUE, _ORANGE, _GREY = "#1f6fb2", "#d95f02", "#777777"


def write_report(run: Path, results: Mapping[str, VerificationResult]) -> Path:
    """Write ``report.md`` and, where matplotlib is installed, ``report.png`` into a run's folder.

    Args:
        run: the run's folder, with ``metrics.jsonl``.
        results: verification by set.

    Returns:
        The path of ``report.md``.
    """
    lines = read_journal(run / "metrics.jsonl")
    drawn = _draw(run / "report.png", [line for line in lines if line["kind"] == "train"], results)
    page = run / "report.md"
    page.write_text("\n".join(_page(run, lines, results, drawn)) + "\n", encoding="utf-8")
    return page


def _page(
    run: Path, journal: list[dict[str, Any]], results: Mapping[str, VerificationResult], drawn: bool
) -> list[str]:
    rates = sorted({rate for result in results.values() for rate in result.tar_at_far}, reverse=True)
    lines = [f"# {run.name}", "", "| set | accuracy | AUC |" + "".join(f" TAR @ FAR {rate:g} |" for rate in rates)]
    lines.append("| --- | --- | --- |" + " --- |" * len(rates))
    for name, result in results.items():
        tars = [result.tar_at_far.get(rate, math.nan) for rate in rates]
        cells = "".join(" too few pairs |" if math.isnan(tar) else f" {tar:.4f} |" for tar in tars)
        lines.append(f"| {name} | {result.accuracy:.4f} ± {result.accuracy_std:.4f} | {result.auc:.4f} |{cells}")
    trained = [line for line in journal if line["kind"] == "train"]
    if trained:
        last = trained[-1]
        speed = sorted(line["samples_per_second"] for line in trained)[len(trained) // 2]
        lines += ["", f"{last['step']} steps, {last['samples']} samples, {_seconds(journal):.0f} s; "]
        lines[-1] += f"median {speed:.0f} samples/s."
        if resumed := sum(line["kind"] == "resumed" for line in journal):
            lines[-1] += f" Starts: {1 + resumed} (steps taken again count once)."
        lines += ["", "| phase | ms a step (last logged) |", "| --- | --- |"]
        lines += [f"| {name} | {1000 * value:.0f} |" for name, value in last["phase_seconds"].items()]
    if drawn:
        lines += ["", "![Loss, target cosine, support vectors and ROC](report.png)"]
    lines += ["", "Configuration: [config.yaml](config.yaml). All figures: [metrics.jsonl](metrics.jsonl)."]
    return lines


def _seconds(journal: list[dict[str, Any]]) -> float:
    """Seconds until the last training line of each start, summed: every start counts from 0."""
    total = of_start = 0.0
    for line in journal:
        if line["kind"] == "resumed":
            total, of_start = total + of_start, 0.0
        elif line["kind"] == "train":
            of_start = line["seconds"]
    return total + of_start


def _draw(path: Path, trained: list[dict[str, Any]], results: Mapping[str, VerificationResult]) -> bool:
    """Draw the curves; False where matplotlib isn't installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    curves = (
        (panels[0, 0], "loss", "Loss", _BLUE),
        (panels[0, 1], "target_cosine", "Target cosine (mean)", _BLUE),
        (panels[1, 0], "support_vectors_per_sample", "Support vectors a sample (mean)", _ORANGE),
    )
    for axes, key, title, colour in curves:
        points = [(line["step"], line[key]) for line in trained if line.get(key) is not None]
        axes.set_title(title)
        axes.set_xlabel("step")
        if points:
            axes.plot(*zip(*points, strict=True), color=colour)
        else:
            axes.text(0.5, 0.5, "not measured in this run", ha="center", va="center", transform=axes.transAxes)
        axes.grid(alpha=0.3)
    axes = panels[1, 1]
    for name, result in results.items():
        axes.plot(result.roc_far, result.roc_tar, label=f"{name}: accuracy {result.accuracy:.4f}")
    axes.set(title="ROC", xlabel="false accept rate", ylabel="true accept rate", xscale="log", ylim=(0, 1.02))
    axes.set_xlim(min((1 / result.different_pairs for result in results.values()), default=1e-4), 1)
    axes.grid(alpha=0.3, which="both", color=_GREY)
    if results:
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    return True
