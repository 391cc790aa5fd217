"""Time and memory of our head step beside the conventional algorithm and the bare matrix products.

For each case, one process times in alternating order: our step (forward, backward, optimizer in backward), the
conventional step of ``conventional.py`` (dense logits, dense update), and the floor: the four products that a step
can't do without (logits, logits again, two gradients), or three where the logits are kept, in the fastest of six
arrangements. A process of its own measures the peak memory of each. Run it alone on its machine:

    python benchmarks/head.py --case cpu-full --json head.json --plot head.png
    python benchmarks/head.py --all --threads 2 --json head.json --plot head.png
    python benchmarks/head.py --classes 50000 --batch 256 --sample-rate 0.5 --rounds 3
    python benchmarks/head.py --filtering --json filtering.json
    python benchmarks/head.py --load head.json --plot head.png
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import filtering
import measure
import report
import torch
from cases import CASES, DTYPES, FLAT, Case, Contender, make_conventional, make_ours, missing_options

# Of the free memory: the rest is for temporaries and for other processes.
_USABLE = 0.92


def time_case(case: Case) -> dict[str, Any]:
    """Times of all contenders of a case, in this process; the conventional one only where it fits."""
    notes: list[str] = []
    room = _USABLE * measure.available_bytes(case.torch_device)
    needs = {who: measure.estimated_bytes(case, who) for who in ("ours", "conventional", "products")}
    ours, head = make_ours(case)
    contenders = [ours]
    if case.with_conventional:
        # Centres are shared where two copies don't fit: a step's time doesn't depend on their values.
        shared = sum(needs.values()) > room
        missing = sum(needs.values()) - room - (case.state_bytes // 2 if shared else 0)
        if missing > 0:
            notes.append(f"conventional: does not fit beside ours, about {missing / 1e9:.1f} GB short; not timed")
        else:
            if shared:
                notes.append("conventional: on the same centres as ours (two copies don't fit)")
            contenders.insert(0, make_conventional(case, head.weight.detach() if shared else None))
    products = measure.Products(case)
    best, trials = products.fastest()
    floor: dict[str, Callable[[], None]] = {
        "four products": lambda: products.run(best, 4),
        "three products": lambda: products.run(best, 3),
    }
    traffic = measure.state_traffic(case)
    return _timings(case, contenders, floor) | {
        "notes": notes,
        "arrangement": str(best),
        "arrangement_seconds": trials,
        "traffic": traffic if len(contenders) == 2 else {"ours": traffic["ours"]},
        "copy_rate": measure.copy_rate(case.torch_device),
    }


def time_flat(case: Case) -> dict[str, Any]:
    """Our step at a small and a large C with the same number of sampled classes, in this process.

    Only C and the sample rate are the named cases'; all else is taken from ``case``.
    """
    sizes = [
        replace(case, name=name, classes=CASES[name].classes, sample_rate=CASES[name].sample_rate) for name in FLAT
    ]
    room, need = (
        _USABLE * measure.available_bytes(case.torch_device),
        sum(measure.estimated_bytes(size, "ours") for size in sizes),
    )
    if need > room:
        note = f"flat: needs about {need / 1e9:.1f} GB in one process, {room / 1e9:.1f} GB are usable; not timed"
        return {"times": {}, "notes": [note]}
    contenders = [make_ours(size, size.name)[0] for size in sizes]
    return _timings(case, contenders, {}) | {"notes": [], "flat": list(FLAT)}


def _timings(case: Case, contenders: list[Contender], others: dict[str, Callable[[], None]]) -> dict[str, Any]:
    times, warm = measure.interleave(case, contenders, others)
    return {"times": {name: asdict(value) for name, value in times.items()}, "warm_seconds": warm}


WORKERS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "time": time_case,
    "flat": time_flat,
    "memory-ours": lambda case: measure.measure_memory(case, "ours"),
    "memory-conventional": lambda case: measure.measure_memory(case, "conventional"),
}


def run_worker(worker: str, case: Case, out: Path) -> None:
    """The part of this script that runs in a process of its own: one measurement, written as JSON."""
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    result = WORKERS[worker](case) | {"environment": report.environment()}
    out.write_text(json.dumps(result), encoding="utf-8")


def start_worker(worker: str, case: Case) -> dict[str, Any]:
    """Run a worker to its end; ``{"failed": why}`` where it did not come back with figures."""
    environment = dict(os.environ)
    if case.threads is not None:
        environment["OMP_NUM_THREADS"] = str(case.threads)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--worker", worker, json.dumps(asdict(case)), str(out)]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return result
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    reason = "killed, most likely out of memory" if done.returncode == -9 else last
    return {"failed": f"{worker}: exit status {done.returncode}: {reason}"}


def measure_case(case: Case, *, flat: bool = False, with_memory: bool = True) -> dict[str, Any]:
    """All figures of a case, each measurement in a process of its own, one after another."""
    title = "flat: " + ", ".join(f"{name} C {CASES[name].classes:,}" for name in FLAT) if flat else case.title
    result: dict[str, Any] = {"title": title, "case": asdict(case), "notes": [], "times": {}, "memory": {}}
    absent = missing_options(case)
    if absent:
        result["notes"].append(f"skipped: PartialFC has no keyword {', '.join(absent)} in this version")
        return result
    if case.device == "cuda" and not torch.cuda.is_available():
        result["notes"].append("skipped: no CUDA device")
        return result
    timed = start_worker("flat" if flat else "time", case)
    if "failed" in timed:
        result["notes"].append(timed["failed"])
    else:
        result |= timed
    if flat or not with_memory:
        return result
    for who in ("conventional", "ours") if case.with_conventional else ("ours",):
        need, room = measure.estimated_bytes(case, who), _USABLE * measure.available_bytes(case.torch_device)
        if need > room:
            result["notes"].append(f"memory, {who}: needs about {need / 1e9:.1f} GB, {room / 1e9:.1f} GB are usable")
            continue
        memory = start_worker(f"memory-{who}", case)
        if "failed" in memory:
            result["notes"].append(memory["failed"])
        else:
            result["memory"][who] = memory
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--case", choices=[*CASES, "flat"], help="a named size; flat: flat-100k and flat-4m interleaved")
    what.add_argument("--all", action="store_true", help="all cases that this machine's device can run")
    what.add_argument("--filtering", action="store_true", help="gradient filtering on a trained model")
    what.add_argument("--load", type=Path, nargs="+", help="files of --json to show and plot again")
    what.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--classes", type=int, help="C")
    parser.add_argument("--batch", type=int, help="B")
    parser.add_argument("--size", type=int, help="d")
    parser.add_argument("--sample-rate", type=float, help="share of the classes a step draws")
    parser.add_argument(
        "--kept", action="store_true", default=None, help="a logits_budget that has room for all logits"
    )
    parser.add_argument("--compute-dtype", choices=list(DTYPES), help="operands of the products")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="auto: a GPU where there is one")
    parser.add_argument("--negatives", choices=["support-vectors", "plain"], help="negative emphasis of both")
    parser.add_argument("--kernels", choices=["auto", "eager", "compiled", "triton"], help="of PartialFC")
    parser.add_argument("--chunk-size", type=int, help="of PartialFC")
    parser.add_argument("--rounds", type=int, help="timed rounds")
    parser.add_argument("--steps", type=int, help="steps of a round")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument(
        "--baseline-sgd", choices=["fused", "default"], default="default", help="default: as trainers call it"
    )
    parser.add_argument("--no-conventional", action="store_true", help="leave the conventional algorithm out")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--filtering-steps", type=int, default=1500, help="training steps of --filtering")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw them (PNG)")
    return parser.parse_args()


def overridden(case: Case, arguments: argparse.Namespace) -> Case:
    """The case with what the command line says otherwise."""
    names = ["classes", "batch", "size", "sample_rate", "kept", "compute_dtype", "device", "negatives", "kernels"]
    names += ["chunk_size", "rounds", "steps", "threads"]
    given: dict[str, Any] = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.no_conventional:
        given["with_conventional"] = False
    return replace(case, fused_baseline=arguments.baseline_sgd == "fused", **given)


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """The results of the cases that the command line asks for, printed as they come."""
    if arguments.all:
        kind = "gpu" if torch.cuda.is_available() and arguments.device != "cpu" else "cpu"
        names = [name for name in CASES if name.startswith(kind)] + ["flat"]
    else:
        names = [arguments.case or "custom"]
    results = {}
    for name in names:
        case = overridden(CASES.get(FLAT[0] if name == "flat" else name, Case()), arguments)
        results[name] = measure_case(case, flat=name == "flat", with_memory=not arguments.no_memory)
        print(report.table(results[name]), flush=True)
    return results


def main() -> None:
    """Measure what is asked for; print, write, draw."""
    arguments = parse()
    if arguments.worker:
        worker, case, out = arguments.worker
        return run_worker(worker, Case(**json.loads(case)), Path(out))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {"environment": report.environment(), "cases": {}}
    if arguments.load:
        for path in arguments.load:
            loaded = json.loads(path.read_text(encoding="utf-8"))
            record = {"environment": loaded["environment"], "cases": record["cases"] | loaded["cases"]}
        for result in record["cases"].values():
            print(report.table(result))
    elif arguments.filtering:
        record["filtering"] = filtering.measure_filtering(
            overridden(filtering.CASE, arguments), arguments.filtering_steps
        )
    else:
        record["cases"] = measure_all(arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    if arguments.plot is not None:
        report.plot(record, arguments.plot)
    return None


if __name__ == "__main__":
    main()
