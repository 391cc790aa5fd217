"""The commands ``partial-fc head ...``: commits with other classes, and commits made of other programs' files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partial_fc.cli_errors import one_line_errors

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Change the classes of a commit, or make one of other programs' files. The result is a new commit.",
)

_Commit = Annotated[
    Path,
    typer.Argument(help="A commit's folder; of a run, or a folder of commits named step-N, the newest usable one."),
]
_Out = Annotated[Path, typer.Argument(help="Folder of the new commit; nothing may be there. Go on: train.resume=OUT.")]


@app.command("import-arcface")
def import_arcface(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER_OR_FILES...", help="checkpoint_gpu_0.pt, ..., of all ranks, or their folder."),
    ],
    out: _Out,
    backbone_name: Annotated[
        str | None, typer.Option(help="What the backbone has to be, such as iresnet100; default: whichever it is.")
    ] = None,
) -> None:
    """Backbone and class centres of arcface_torch's checkpoints, which may hold tensors and plain values only."""
    with one_line_errors():
        from partial_fc.head_tools import run_import_arcface

        run_import_arcface(sources, out, backbone_name=backbone_name)


@app.command("import-weights")
def import_weights(
    file: Annotated[Path, typer.Argument(help="A matrix [classes, embedding size]: .npy, .safetensors, .pt or .pth.")],
    out: _Out,
    key: Annotated[str | None, typer.Option(help="Name of the matrix in a file with several tensors.")] = None,
) -> None:
    """Class centres from a plain matrix."""
    with one_line_errors():
        from partial_fc.head_tools import run_import_weights

        run_import_weights(file, out, key=key)


@app.command()
def extend(
    commit: _Commit,
    out: _Out,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="How --data is read, such as data.format=tfrecord."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Images of the new classes: centres are made of their embeddings.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Number of new classes without images: their centres are random.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a forward.")] = 128,
    limit_per_class: Annotated[
        int | None, typer.Option(min=1, help="Look at the first so many images of a class; default: all.")
    ] = None,
) -> None:
    """Add classes behind the last one, with centres made of images (--data) or random ones (--count)."""
    with one_line_errors():
        from partial_fc.head_tools import run_extend

        run_extend(
            commit,
            out,
            overrides or [],
            data=data,
            count=count,
            batch_size=batch_size,
            limit_per_class=limit_per_class,
        )


@app.command()
def remap(
    commit: _Commit,
    out: _Out,
    order: Annotated[
        Path | None,
        typer.Option(help="Text: line i, from 0, has the old id of new class i (none is empty); others are removed."),
    ] = None,
    remove: Annotated[
        Path | None, typer.Option(help="Text: ids of classes that are removed; those behind them move up.")
    ] = None,
) -> None:
    """Reorder or remove classes. OUT.classes.csv then says which id became which: see prepare --class-map."""
    with one_line_errors():
        from partial_fc.head_tools import run_remap

        run_remap(commit, out, order=order, remove=remove)


@app.command()
def merge(
    commit: _Commit,
    out: _Out,
    groups: Annotated[Path, typer.Option(help="Text: each line has the ids of classes that are one.")],
) -> None:
    """Merge classes. OUT.classes.csv then says which id became which: see prepare --class-map."""
    with one_line_errors():
        from partial_fc.head_tools import run_merge

        run_merge(commit, out, groups=groups)
