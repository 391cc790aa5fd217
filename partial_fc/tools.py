"""The tools that look at data sets or write them: what the command line's ``prepare``, ``validate`` and ``show`` do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from partial_fc import build
from partial_fc.config import Config, data_config
from partial_fc.data import Sources
from partial_fc.data.contact_sheet import contact_sheet
from partial_fc.data.findings import render
from partial_fc.data.prepare import PrepareReport, prepare
from partial_fc.data.validate import validate
from partial_fc.errors import ConfigError, DataError
from partial_fc.progress import progress_bar


def run_prepare(
    source: Path,
    destination: Path,
    overrides: Sequence[str],
    *,
    format: Literal["recordio", "webdataset"],
    size: int | None,
    quality: int | None,
    workers: int | None,
    shard_size: int,
    shuffle_seed: int | None,
) -> None:
    """Write a data set anew, and say what was written; arguments as of :func:`partial_fc.data.prepare.prepare`.

    Raises:
        ConfigError, DataError: the set can't be read, or not be written so.
    """
    config, sources = _open(source, overrides)
    with progress_bar("writing the images") as progress:
        report = prepare(
            sources,
            destination,
            format=format,
            image_size=size,
            quality=quality,
            workers=workers,
            shard_size=shard_size,
            shuffle_seed=shuffle_seed,
            max_image_pixels=config.data.max_image_pixels,
            progress=progress,
        )
    _say_prepared(report)


def _say_prepared(report: PrepareReport) -> None:
    copied = report.written - report.reencoded
    print(
        f"{report.written:,} of {report.samples:,} images of {report.num_classes:,} classes in {report.destination} "
        f"({report.reencoded:,} encoded anew, {copied:,} copied; {report.bytes / 1e6:,.1f} MB in {report.files} files)"
    )
    for kind, count in report.skipped.items():
        print(f"left out: {count:,} ({kind})")
        for reason in report.reasons.get(kind, []):
            print(f"  {reason}")


def run_validate(path: Path, overrides: Sequence[str], *, limit: int | None, json_file: Path | None) -> bool:
    """Check every sample of a data set, and print a report; True where every one can be used.

    Raises:
        ConfigError, DataError: the set can't be read at all.
    """
    config, sources = _open(path, overrides)
    with progress_bar("decoding the images") as progress:
        report = validate(
            sources,
            max_image_pixels=config.data.max_image_pixels,
            image_size=config.data.image_size,
            progress=progress,
            sample_limit=limit,
        )
    print(render(report))
    if json_file is not None:
        _write(json_file, (json.dumps(report.as_dict(), indent=1) + "\n").encode())
    return report.ok


def run_show(
    path: Path, overrides: Sequence[str], *, out: Path, classes: int, class_ids: Sequence[int], columns: int
) -> None:
    """Draw augmented samples of a few classes into a picture.

    Raises:
        ConfigError, DataError: the set can't be read, or the picture not be written.
    """
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ConfigError(f"{out}: got a name that ends in {out.suffix!r}, expected .png, .jpg or .webp")
    config, sources = _open(path, overrides)
    sheet = contact_sheet(
        sources,
        build.build_augmentation(config.augment),
        image_size=config.data.image_size,
        seed=config.train.seed,
        classes=classes,
        class_ids=class_ids or None,
        columns=columns,
        max_image_pixels=config.data.max_image_pixels,
    )
    try:
        sheet.save(out)
    except OSError as error:
        raise DataError(f"{out}: can't be written ({error.strerror or error}): name another file") from error
    print(f"{out}: {sheet.width} x {sheet.height} pixels")


def _open(path: Path, overrides: Sequence[str]) -> tuple[Config, Sources]:
    config = data_config(path, overrides)
    with progress_bar("finding the images") as progress:
        return config, build.build_sources(config, progress)


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise DataError(f"{path}: can't be written ({error.strerror or error}): name another file") from error
