"""What metrics cost a training: seconds spent on them by step, beside the step's own, while a scraper asks.

A run of a configuration is trained in this process; every function that exists for metrics alone is timed (wall and CPU
seconds of the training thread), and a thread scrapes the endpoint meanwhile. Steps that log are told apart from those
that don't. The share is of the whole time from the first counted step to the last; compiling is over by then.

    python benchmarks/metrics.py configs/demo.yaml --steps 150 train.log_every=50
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from partial_fc import collectives, figures, forward, head, training_step
from partial_fc.build import Place
from partial_fc.config import load_config
from partial_fc.phases import PhaseTimer
from partial_fc.train import Trainer

_WARM_STEPS = 20


class Spent:
    """Seconds of the training thread in functions that are for metrics alone, by name."""

    def __init__(self) -> None:
        self.wall: defaultdict[str, float] = defaultdict(float)
        self.cpu: defaultdict[str, float] = defaultdict(float)
        self._depth = 0

    def watch(self, owner: Any, name: str, title: str) -> None:
        """Time a function or method from now on; what it calls of others that are watched counts once."""
        genuine: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(genuine)
        def timed(*args: Any, **options: Any) -> Any:
            if self._depth or threading.current_thread() is not threading.main_thread():
                return genuine(*args, **options)
            self._depth += 1
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return genuine(*args, **options)
            finally:
                self._depth -= 1
                self.wall[title] += time.perf_counter() - wall
                self.cpu[title] += time.thread_time() - cpu

        setattr(owner, name, timed)


class Scraper(threading.Thread):
    """Asks for the metrics again and again."""

    def __init__(self, url: Callable[[], str | None], every: float) -> None:
        super().__init__(daemon=True)
        self._url, self._every, self._ends = url, every, threading.Event()
        self.seconds: list[float] = []
        self.bytes = 0

    def run(self) -> None:
        """Until :meth:`end`."""
        while not self._ends.wait(self._every):
            url = self._url()
            if url is None:
                continue
            begin = time.perf_counter()
            with urllib.request.urlopen(url, timeout=5) as answer:
                self.bytes = len(answer.read())
            self.seconds.append(time.perf_counter() - begin)

    def end(self) -> None:
        """Ask no more."""
        self._ends.set()
        self.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--scrape-every", type=float, default=1.0, help="seconds; Prometheus' default is 60, ours 15")
    parser.add_argument("--json", help="write the figures into this file, too")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.config, arguments.overrides, arguments.steps, arguments.scrape_every, folder)
    print(json.dumps(found, indent=1))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


def measure(config: str, overrides: list[str], steps: int, scrape_every: float, folder: str) -> dict[str, Any]:
    """Train, and say what metrics took."""
    total = steps + _WARM_STEPS
    fixed = [f"train.steps={total}", f"train.run_dir={folder}", "evaluate.sets=[]", "metrics.enabled=true"]
    settings = load_config(config, [*overrides, *fixed])
    place = Place(0, 1, 0, torch.device("cpu"))
    trainer = Trainer(settings, place)
    spent, marks = Spent(), [0.0, 0.0]
    kept: list[Any] = []
    genuine_start, genuine_run = figures.TrainingMetrics.start, training_step.TrainingStep.run

    def start(self: Any, *args: Any, **options: Any) -> Any:
        kept.append(self)
        return genuine_start(self, 0, *args[1:], **options)

    def run(self: Any, number: int, **options: Any) -> Any:
        if number == _WARM_STEPS:
            _watch(spent)
            marks[:] = time.perf_counter(), time.process_time()
        return genuine_run(self, number, **options)

    figures.TrainingMetrics.start = start  # type: ignore[method-assign]
    training_step.TrainingStep.run = run  # type: ignore[method-assign]
    scraper = Scraper(lambda: kept[0].url if kept else None, scrape_every)
    scraper.start()
    genuine_evaluate = trainer_evaluate()
    try:
        trainer.fit()
    finally:
        scraper.end()
    seconds, cpu = genuine_evaluate["wall"] - marks[0], genuine_evaluate["cpu"] - marks[1]
    return {
        "steps": steps,
        "step_ms": 1000 * seconds / steps,
        "step_cpu_ms": 1000 * cpu / steps,
        "metrics_us_a_step": {name: round(1e6 * value / steps, 1) for name, value in spent.wall.items()},
        "metrics_share_of_wall": sum(spent.wall.values()) / seconds,
        "metrics_share_of_cpu": sum(spent.cpu.values()) / cpu,
        "scrapes": len(scraper.seconds),
        "scrape_ms": 1000 * statistics.median(scraper.seconds) if scraper.seconds else None,
        "scrape_bytes": scraper.bytes,
    }


def trainer_evaluate() -> dict[str, float]:
    """Where the clocks stood when the steps were done: at the evaluation that follows them."""
    from partial_fc.loop import Loop

    marks: dict[str, float] = {}
    genuine = Loop.evaluate

    def evaluate(self: Any) -> Any:
        marks.setdefault("wall", time.perf_counter())
        marks.setdefault("cpu", time.process_time())
        return genuine(self)

    Loop.evaluate = evaluate  # type: ignore[method-assign]
    return marks


def _watch(spent: Spent) -> None:
    spent.watch(figures.Figures, "read", "read and count")
    spent.watch(training_step.TrainingStep, "nearest", "nearest classes")
    spent.watch(forward, "_norm_range", "centre norms")
    spent.watch(head.PartialFC, "_positives", "positive classes")
    spent.watch(collectives.HeadGroup, "_count", "bytes sent")
    spent.watch(PhaseTimer, "end_step", "phases")


if __name__ == "__main__":
    main()
