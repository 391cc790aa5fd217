"""Tables, JSON and plots of what ``head.py`` measured."""

from __future__ import annotations

import datetime
import platform
import re
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

GIGABYTE = 1e9
_COLOURS = {"conventional": "#c44e52", "ours": "#4c72b0", "products": "#9a9a9a"}


def environment() -> dict[str, Any]:
    """The machine, versions, date and command line."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8", errors="replace") if information.exists() else ""
    found = re.search(r"model name\s*:\s*(.*)", text)
    return {
        "cpu": found[1] if found else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def medians(result: Mapping[str, Any], key: str = "seconds") -> dict[str, float]:
    """The median of each contender of a case."""
    return {name: statistics.median(times[key]) for name, times in result["times"].items()}


def table(result: Mapping[str, Any]) -> str:
    """What a case measured, as text."""
    lines = ["", result["title"]]
    lines += [f"  {note}" for note in result["notes"]]
    if not result.get("times"):
        return "\n".join(lines)
    wall, cpu = medians(result), medians(result, "cpu_seconds")
    four, three = wall.get("four products"), wall.get("three products")
    lines.append(f"  {'':16}{'step s':>10}{'cpu s':>10}{'x four':>9}{'x three':>9}{'peak/(W+M)':>12}")
    for name, seconds in wall.items():
        over = "".join(f"{seconds / floor:9.2f}" if floor else f"{'':9}" for floor in (four, three))
        memory = result["memory"].get(name)
        peak = f"{memory['ratio']:12.2f}" if memory and "ratio" in memory else ""
        lines.append(f"  {name:16}{seconds:10.4f}{cpu[name]:10.4f}{over}{peak}")
    lines += [f"  {line}" for line in _remarks(result, wall)]
    return "\n".join(lines)


def _remarks(result: Mapping[str, Any], wall: Mapping[str, float]) -> list[str]:
    lines = []
    if "conventional" in wall and "ours" in wall:
        lines.append(f"conventional / ours: {wall['conventional'] / wall['ours']:.2f}")
    if "arrangement" in result:
        lines.append(f"products: fastest are {result['arrangement']}")
    for name, count in result.get("traffic", {}).items():
        lines.append(
            f"state touched, {name}: {count / GIGABYTE:.2f} GB, a copy takes {count / result['copy_rate']:.4f} s"
        )
    for name, memory in result["memory"].items():
        if "ratio" in memory:
            once, peak, state = (memory[key] / GIGABYTE for key in ("once_bytes", "peak_bytes", "state_bytes"))
            lines.append(f"memory, {name}: {peak:.3f} GB over {state:.3f} GB of weights + momentum; once {once:.3f} GB")
        if memory.get("note"):
            lines.append(f"memory, {name}: {memory['note']}")
    if "flat" in result:
        lines.append(f"{' / '.join(reversed(result['flat']))}: {wall[result['flat'][1]] / wall[result['flat'][0]]:.3f}")
    for name, seconds in result.get("warm_seconds", {}).items():
        lines.append(f"first three steps, {name}: {seconds:.2f} s")
    return lines


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Bars of step time and of peak memory, one row of panels a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = {name: result for name, result in record["cases"].items() if result.get("times")}
    if not cases:
        print("nothing to plot: no case has times")
        return
    heights = [0.55 + 0.3 * len(result["times"]) for result in cases.values()]
    figure, panels = plt.subplots(
        len(cases), 2, figsize=(12, 1 + sum(heights)), squeeze=False, height_ratios=heights, width_ratios=(1.6, 1)
    )
    for (left, right), result in zip(panels, cases.values(), strict=True):
        _time_panel(left, result)
        _memory_panel(right, result)
    machine = record["environment"]
    figure.suptitle(
        f"Head step: {machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['date'][:10]}",
        fontsize=12,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _time_panel(panel: Any, result: Mapping[str, Any]) -> None:
    wall = medians(result)
    names, values = list(wall), list(wall.values())
    base = wall.get("four products")
    bars = panel.barh(names, values, color=[_colour(name) for name in names], height=0.7)
    labels = []
    for name, value in wall.items():
        ratios = [] if base is None or name == "four products" else [f"{value / base:.2f} x four products"]
        ratios += [f"{value / wall['ours']:.2f} x ours"] if name == "conventional" else []
        labels.append(_seconds(value) + (f"  ({', '.join(ratios)})" if ratios else ""))
    _finish(panel, bars, labels, result["title"], max(values) * 1.6)
    panel.set_xlabel("seconds a step (median)", fontsize=8)


def _memory_panel(panel: Any, result: Mapping[str, Any]) -> None:
    ratios = {name: memory["ratio"] for name, memory in result["memory"].items() if "ratio" in memory}
    if not ratios:
        panel.axis("off")
        return
    bars = panel.barh(list(ratios), list(ratios.values()), color=[_colour(name) for name in ratios], height=0.7)
    _finish(panel, bars, [f"{ratio:.2f}" for ratio in ratios.values()], "", max(ratios.values()) * 1.2)
    panel.axvline(1, color="black", linewidth=0.8, linestyle=":")
    panel.set_xlabel("peak memory / (weights + momentum)", fontsize=8)


def _finish(panel: Any, bars: Any, labels: list[str], title: str, limit: float) -> None:
    panel.bar_label(bars, labels, padding=4, fontsize=8)
    panel.set_title(title, loc="left", fontsize=9)
    panel.set_xlim(0, limit)
    panel.invert_yaxis()
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _colour(name: str) -> str:
    return next((colour for key, colour in _COLOURS.items() if key in name), _COLOURS["ours"])


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"
