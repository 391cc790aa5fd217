"""Images a second, and CPU time an image, of our streams beside DALI's own reader and PyTorch's DataLoader.

All read the same RecordIO files (drawn ones, where none are given), decode, flip at random, and give normalised float32
batches. Before they are timed they show in an epoch that they do the same work. Run it alone on its machine:

    python benchmarks/data.py --json data.json --chart data.png
    python benchmarks/data.py --data ../shared/data/omniglot --batch 128 --threads 2 --passes 5
    python benchmarks/data.py --augment rotate=0.1 --augment scale=0.1 --contenders ours-dali ours-python
    python benchmarks/data.py --load data.json --chart data.png

"x reader" and "x loader" are images a CPU second over those of DALI's own reader and of the DataLoader with OpenCV: the
median of the rounds' ratios. The CPU time is that of a contender's process and of all that it started. Where a process
gets its buffers from decides how many pages it touches anew at each batch: that can be a tenth of its CPU time, and
stays so for its life. So every contender is started several times.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import report
import torch
from data_contenders import CONTENDERS, Work, write_image_index
from data_rounds import ContenderFailed, ContenderProcess, Round, differences, efficiency_ratio, take_turns
from rich import box
from rich.console import Console
from rich.table import Table

from partial_fc.data import dali_available
from partial_fc.data.synthetic import make_dataset

_READER, _LOADER = "dali-reader", "loader-opencv"
_DEFAULT = ["ours-dali", "ours-python", _READER, _LOADER]
# Images a CPU second of ours with DALI over those of others: what is demanded of them.
_DEMANDS = {_READER: 0.95, _LOADER: 1.6}
# An epoch is looked at where it is no longer.
_CHECKED = 100_000
_IDENTITIES, _IMAGES = 500, 20
_COLOURS = {"ours": "#4c72b0", "dali": "#76b041", "loader": "#c44e52"}
_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "opencv-python-headless", "pillow", "numpy")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.rec and train.idx, or a .rec; else one is drawn")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=_DEFAULT)
    parser.add_argument("--batch", type=int, default=128, help="images of a batch")
    parser.add_argument("--threads", type=int, default=2, help="that decode, of ours and of DALI's reader")
    parser.add_argument("--workers", type=int, default=2, help="processes of the DataLoader")
    parser.add_argument("--prefetch", type=int, default=2, help="batches ahead; of the DataLoader, a worker's")
    parser.add_argument("--image-size", type=int, default=112, help="pixels of a side of the images in the files")
    parser.add_argument("--batches", type=int, default=30, help="timed batches of a round")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of a pass")
    parser.add_argument("--passes", type=int, default=3, help="times that all processes are started anew")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: DALI decodes on the GPU")
    parser.add_argument("--seed", type=int, default=1, help="of order and flips")
    parser.add_argument(
        "--augment", action="append", default=[], metavar="KEY=VALUE", help="of Augmentation; ours alone does it"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--chart", type=Path, help="where to draw them (PNG or SVG)")
    parser.add_argument("--load", type=Path, help="file of --json to show and draw again")
    arguments = parser.parse_args()
    try:
        pairs = (given.split("=", 1) for given in arguments.augment)
        arguments.augment = {key: ast.literal_eval(value) for key, value in pairs}
    except (ValueError, SyntaxError):
        parser.error(f"--augment takes KEY=VALUE with a number, such as rotate=0.1, got {arguments.augment}")
    for name in ("batch", "threads", "workers", "prefetch", "image_size", "batches", "rounds", "passes"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(arguments, name)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    return arguments


def chosen(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The contenders that can run here, and notes on those that can't."""
    names = [name for name in CONTENDERS if name in arguments.contenders]
    if dali_available():
        return names, []
    left_out = [name for name in names if CONTENDERS[name].dali]
    notes = [f"{', '.join(left_out)}: left out, NVIDIA DALI isn't installed"] if left_out else []
    return [name for name in names if name not in left_out], notes


def prepare(data: Path | None, folder: Path) -> tuple[Path, int, str]:
    """The ``.rec`` file, read once so that the page cache holds it; its number of images; and what it is.

    Raises:
        SystemExit: the file or its index isn't there.
    """
    if data is None:
        # No pairs are verified; the fewest that can be written.
        make_dataset(
            folder, identities=_IDENTITIES, images_per_identity=_IMAGES, validation_identities=20, pairs=20, seed=0
        )
        data = folder
    record = data / "train.rec" if data.is_dir() else data
    for path in (record, record.with_suffix(".idx")):
        if not path.is_file():
            raise SystemExit(f"{path} isn't there: set --data to a folder with train.rec and train.idx, or to a .rec")
    count = write_image_index(record, folder / "images.idx")
    with open(record, "rb") as file:
        while file.read(1 << 24):
            pass
    what = "drawn" if data == folder else data.resolve().name
    return record, count, f"{what}, {count:,} images, {record.stat().st_size / count / 1000:.1f} kB an image"


def check(contenders: Sequence[ContenderProcess], count: int, augmented: bool) -> None:
    """Let every contender go through an epoch, and compare.

    Raises:
        SystemExit: they don't do the same work.
    """
    facts = {contender.name: contender.check(min(count, _CHECKED)) for contender in contenders}
    ours = [name for name in facts if name.startswith("ours")]
    if found := differences(facts, whole=count <= _CHECKED, augmented=ours if augmented else ()):
        raise SystemExit("the contenders don't do the same work:\n  " + "\n  ".join(found))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    names, notes = chosen(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        record, count, title = prepare(arguments.data, Path(scratch))
        same = ("batch", "threads", "workers", "prefetch", "image_size", "seed", "device", "augment")
        work = Work(
            record=str(record),
            index=str(Path(scratch) / "images.idx"),
            **{key: getattr(arguments, key) for key in same},
        )
        lead = 2 + arguments.prefetch * max(2, arguments.workers)
        load = os.getloadavg()[0]
        rounds: dict[str, list[Round]] = {name: [] for name in names}
        for number in range(arguments.passes):
            with contextlib.ExitStack() as processes:
                contenders = [
                    processes.enter_context(ContenderProcess(name, CONTENDERS[name].open, work)) for name in names
                ]
                if number == 0:
                    check(contenders, count, augmented=bool(arguments.augment))
                for name, found in take_turns(contenders, arguments.rounds, lead, arguments.batches).items():
                    rounds[name] += found
    if count > _CHECKED:
        notes.append(f"checked: type, shape and range of {_CHECKED:,} images; not which images they are")
    if arguments.augment:
        notes.append(f"ours alone also does {arguments.augment}")
    settings = {key: value for key, value in asdict(work).items() if key not in ("record", "index")}
    settings |= {"lead": lead} | {key: getattr(arguments, key) for key in ("batches", "rounds", "passes")}
    return {
        "data": title,
        "settings": settings
        | {"lead": lead}
        | {key: getattr(arguments, key) for key in ("batches", "rounds", "passes")},
        "load_before": load,
        "notes": notes,
        "rounds": {name: [asdict(one) for one in of_one] for name, of_one in rounds.items()},
        "ratios": {
            reference: {name: efficiency_ratio(rounds, name, reference) for name in names}
            for reference in _DEMANDS
            if reference in names
        },
    }


def environment() -> dict[str, Any]:
    """The machine, versions, date and command line."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return report.environment() | {"processors": len(os.sched_getaffinity(0)), "packages": versions}


def spread(rounds: Sequence[Mapping[str, float]], key: str) -> tuple[float, float, float]:
    """Median, least and most of the rounds."""
    values = [one[key] for one in rounds]
    return statistics.median(values), min(values), max(values)


def heading(record: Mapping[str, Any]) -> str:
    """Machine and settings, on two lines."""
    machine, settings = record["environment"], record["result"]["settings"]
    place = machine["gpu"] if settings["device"] == "cuda" else machine["cpu"]
    return (
        f"{place}, {machine['processors']} CPUs, torch {machine['torch']}, {machine['date'][:10]}\n"
        f"{record['result']['data']}; batch {settings['batch']}, {settings['threads']} threads or "
        f"{settings['workers']} workers, prefetch {settings['prefetch']}, on {settings['device']}"
    )


def show(record: Mapping[str, Any], console: Console) -> None:
    """Print the table, the notes, and what the demands say."""
    result = record["result"]
    console.print(heading(record), highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("median (least - most)")
    for column in ("images/s", "us CPU an image", "x reader", "x loader"):
        table.add_column(column, justify="right")
    for name, rounds in result["rounds"].items():
        wall = "{:,.0f} ({:,.0f} - {:,.0f})".format(*spread(rounds, "images_per_second"))
        cpu = "{:.1f} ({:.1f} - {:.1f})".format(*spread(rounds, "cpu_microseconds"))
        ratios = [result["ratios"].get(reference, {}).get(name) for reference in (_READER, _LOADER)]
        table.add_row(CONTENDERS[name].title, wall, cpu, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
    for note in result["notes"]:
        console.print(note, highlight=False)
    for reference, demand in _DEMANDS.items():
        ratio = result["ratios"].get(reference, {}).get("ours-dali")
        if ratio is not None:
            verdict = "met" if ratio >= demand else "missed"
            console.print(
                f"ours with DALI / {CONTENDERS[reference].title}, images a CPU second: {ratio:.3f}, "
                f"demanded {demand}: {verdict}",
                highlight=False,
            )


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Bars of images a second and of CPU time an image: medians, with a line from the least to the most."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rounds = record["result"]["rounds"]
    titles = [CONTENDERS[name].title for name in rounds]
    colours = [_COLOURS[name.split("-")[0]] for name in rounds]
    figure, panels = plt.subplots(1, 2, figsize=(11, 1.3 + 0.45 * len(rounds)), sharey=True)
    for panel, key, label, form in (
        (panels[0], "images_per_second", "images a second: median, least to most", "{:,.0f}"),
        (panels[1], "cpu_microseconds", "CPU time an image, microseconds: median, least to most", "{:.0f}"),
    ):
        middle, least, most = zip(*(spread(of_one, key) for of_one in rounds.values()), strict=True)
        below, above = ([abs(a - b) for a, b in zip(middle, ends, strict=True)] for ends in (least, most))
        panel.barh(titles, middle, color=colours, height=0.65)
        panel.errorbar(middle, titles, xerr=[below, above], fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
        for title, value, end in zip(titles, middle, most, strict=True):
            panel.annotate(
                form.format(value), (end, title), (5, 0), textcoords="offset points", va="center", fontsize=9
            )
        panel.set_xlim(0, 1.15 * max(most))
        panel.set_xlabel(label, fontsize=9)
        panel.tick_params(labelsize=9, left=False)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(heading(record), fontsize=9, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, or load what was measured; print, write, draw."""
    arguments = parse()
    if arguments.load is not None:
        record = json.loads(arguments.load.read_text(encoding="utf-8"))
    else:
        try:
            record = {"result": measure(arguments), "environment": environment()}
        except ContenderFailed as error:
            sys.exit(str(error))
    show(record, Console(width=None if sys.stdout.isatty() else 120))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.chart is not None:
        draw(record, arguments.chart)


if __name__ == "__main__":
    main()
