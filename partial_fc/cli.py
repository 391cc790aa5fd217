"""The command line: ``partial-fc`` = ``python -m partial_fc``."""

from __future__ import annotations

import enum
import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from partial_fc import cli_head
from partial_fc.cli_errors import leave, one_line_errors
from partial_fc.errors import PartialFCError


class _Format(str, enum.Enum):
    recordio = "recordio"
    webdataset = "webdataset"


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train and evaluate classifiers with very many classes.",
)

app.add_typer(cli_head.app, name="head")

_Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the configuration, such as train.steps=1000."),
]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Configuration, a YAML file.")], overrides: _Overrides = None
) -> None:
    """Train. Start it with torchrun for several ranks, alone for one."""
    with one_line_errors():
        from partial_fc.config import load_config
        from partial_fc.ranks import joined_ranks
        from partial_fc.train import Trainer

        settings = load_config(config, overrides or [])
        with joined_ranks(settings) as place:
            Trainer(settings, place).fit()


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder, with config.yaml and model.")],
    overrides: _Overrides = None,
    report: Annotated[bool, typer.Option(help="Write report.md and its pictures into the run's folder.")] = True,
) -> None:
    """Verify a run's saved model on its evaluate.sets. Start it with torchrun for several ranks, alone for one."""
    with one_line_errors():
        from partial_fc.config import load_config
        from partial_fc.ranks import joined_ranks
        from partial_fc.report import write_report
        from partial_fc.verify import describe, evaluate_saved

        if not (run / "config.yaml").is_file():
            raise PartialFCError(f"{run}: no run is there, expected a folder with config.yaml and model")
        settings = load_config(run / "config.yaml", overrides or [])
        with joined_ranks(settings) as place:
            results = evaluate_saved(settings, run, place)
            if place.rank == 0:
                for name, result in results.items():
                    print(describe(name, result))
                if report:
                    print(f"report        {write_report(run, results)}")


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a folder of runs.")],
    watch: Annotated[
        float | None,
        typer.Option(
            min=0.1, max=86_400, metavar="SECONDS", help="Look again and again, until the run has ended or Ctrl-C."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all that is known as JSON, an object a look.")] = False,
    endpoints: Annotated[bool, typer.Option(help="Ask the ranks for their metrics.")] = True,
) -> None:
    """Say how a run stands: progress, speed, figures, commits, faults, ranks. It reads only.

    Exit code 0: it runs or is finished, 3: failed, 4: saved and ended on a signal, 5: no sign of life, or no progress.
    """
    with one_line_errors():
        from partial_fc.status import show_status

        code = show_status(run, watch=watch, as_json=json, endpoints=endpoints)
    raise typer.Exit(code)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="Configuration, a YAML file.")],
    overrides: _Overrides = None,
    classes: Annotated[
        list[int] | None,
        typer.Option(help="Number of classes, repeatable; default: data.num_classes and 10^6 to 10^9."),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Number of ranks.")] = 8,
    memory: Annotated[
        str | None, typer.Option(help="Memory of a rank, such as 141GiB; default: that of --gpu, else 80GB.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="What a rank has: v100-16, v100-32, a100-40, a100-80, l40s, h100, h200 or b200."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures into this file, too.")] = None,
) -> None:
    """Say what a run would take: memory by item, bytes sent, operations, and the most classes that fit."""
    with one_line_errors():
        from partial_fc.config import load_config
        from partial_fc.plan_report import make_plan

        settings = load_config(config, overrides or [])
        make_plan(settings, classes=classes or [], ranks=ranks, memory=memory, gpu=gpu, json_file=json)


_DataSet = Annotated[
    Path,
    typer.Argument(help="A data set of any format (folder, file or pattern of shards), or a configuration with one."),
]
_DataOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="How it is read, such as data.format=tfrecord."),
]


@app.command()
def prepare(
    source: _DataSet,
    destination: Annotated[Path, typer.Argument(help="Folder of the new data set.")],
    overrides: _DataOverrides = None,
    format: Annotated[_Format, typer.Option(help="Format of the new data set.")] = _Format.recordio,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the new images; default: as they are.")] = None,
    quality: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="JPEG quality, for all images; default: 95 for those whose size changes."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that encode; default: one a core.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples of a WebDataset shard.")] = 10_000,
    shuffle_seed: Annotated[
        int | None, typer.Option(help="Shuffle the samples of a WebDataset, for readers that don't.")
    ] = None,
    class_map: Annotated[
        Path | None,
        typer.Option(help="New ids of the classes: the .classes.csv of head remap or merge; -1: left out."),
    ] = None,
) -> None:
    """Write a data set anew, as RecordIO or WebDataset. Interrupted, it goes on where it stopped.

    Every sample that can be used is written once: weights of sets don't matter here.
    """
    with one_line_errors():
        from partial_fc.tools import run_prepare

        run_prepare(
            source,
            destination,
            overrides or [],
            format=format.value,
            size=size,
            quality=quality,
            workers=workers,
            shard_size=shard_size,
            shuffle_seed=shuffle_seed,
            class_map=class_map,
        )


@app.command()
def validate(
    path: _DataSet,
    overrides: _DataOverrides = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Check so many samples only, spread over the set, and no checksums.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that decode; default: one a core.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the findings into this file, too.")] = None,
) -> None:
    """Decode every image of a data set and report on it.

    Exit code 1 where a sample can't be used or a checksum is wrong, 2 where the set couldn't be checked.
    """
    with one_line_errors(exit_code=2):
        from partial_fc.tools import run_validate

        usable = run_validate(path, overrides or [], limit=limit, workers=workers, json_file=json)
    if not usable:
        raise typer.Exit(1)


@app.command()
def show(
    path: _DataSet,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Augmentations to look at, such as augment.blur=1."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("contact_sheet.png"),
    classes: Annotated[int, typer.Option(min=1, help="How many classes, spread over all.")] = 6,
    class_id: Annotated[list[int] | None, typer.Option(min=0, help="This class, repeatable.")] = None,
    columns: Annotated[int, typer.Option(min=2, help="Images in a row.")] = 10,
) -> None:
    """Draw augmented samples of a few classes into a picture."""
    with one_line_errors():
        from partial_fc.tools import run_show

        run_show(path, overrides or [], out=out, classes=classes, class_ids=class_id or [], columns=columns)


@app.command()
def doctor(
    config: Annotated[Path, typer.Argument(help="Configuration, a YAML file.")],
    overrides: _Overrides = None,
    mb: Annotated[int, typer.Option(min=1, help="Megabytes of the large message of the bandwidth test.")] = 64,
    join_seconds: Annotated[float, typer.Option(min=1, help="How long to wait for the other ranks.")] = 60.0,
    json: Annotated[Path | None, typer.Option(help="Write all findings and figures into this file, too.")] = None,
) -> None:
    """Look for what would stop or slow a run, on every rank. Start it as the run will be started.

    Exit code 1 where something failed, 0 where there are warnings only.
    """
    with one_line_errors():
        from partial_fc.doctor import run_doctor

        ready = run_doctor(config, overrides or [], megabytes=mb, json_file=json, join_seconds=join_seconds)
    # At once: a group that failed can't be taken down in order.
    leave(0 if ready else 1)


@app.command()
def demo(
    config: Annotated[Path, typer.Option(help="Configuration of the demonstration.")] = Path("configs/demo.yaml"),
    overrides: _Overrides = None,
) -> None:
    """Make a data set where there is none, train on it with torchrun, evaluate, and say where everything is."""
    with one_line_errors():
        from partial_fc.demo import run_demo

        run_demo(config, overrides or [])


def main() -> None:
    """Entry point of ``partial-fc``."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # What every rank would say alike is said once.
    logging.getLogger("partial_fc").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    app()
