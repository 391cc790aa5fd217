"""The tools that look at data sets or write them: what the command line's ``prepare``, ``validate`` and ``show`` do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from partial_fc import build
from partial_fc.config import Config, data_config
from partial_fc.data import Sources
from partial_fc.data.class_map import read_class_map
from partial_fc.data.contact_sheet import contact_sheet
from partial_fc.data.findings import render
from partial_fc.data.prepare import PrepareReport, prepare
from partial_fc.data.validate import validate
from partial_fc.errors import ConfigError, DataError
from partial_fc.progress import progress_bar, progress_bars

# Pixels of the longest side that a format has room for: PNG's fields have 31 bits.
_LONGEST_SIDE = {".png": (1 << 31) - 1, ".jpg": 65500, ".jpeg": 65500, ".webp": 16383}


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
    class_map: Path | None = None,
) -> None:
    """Write a data set anew, and say what was written; arguments as of :func:`partial_fc.data.prepare.prepare`.

    ``class_map`` is a file, ``old,new`` a line, as ``partial-fc head remap`` and ``head merge`` write it.

    Raises:
        ConfigError, DataError: the set can't be read, or not be written so.
    """
    destination = given_path(destination, "the folder of the new data set")
    new_ids = None if class_map is None else read_class_map(class_map.expanduser())
    config, sources = _open(source, overrides)
    if any(part.weight != 1 for part in (config.data, *config.data.more)):
        print("data.weight doesn't matter here: every sample is written once")
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
            class_map=new_ids,
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


def run_validate(
    path: Path, overrides: Sequence[str], *, limit: int | None, workers: int | None, json_file: Path | None
) -> bool:
    """Check every sample of a data set, and print a report; True where every one can be used.

    Raises:
        ConfigError, DataError: the set can't be read at all, or ``json_file`` not be written.
    """
    if json_file is not None:
        json_file = json_file.expanduser()
        _check_target(json_file)
    config, sources = _open(path, overrides)
    with progress_bars("decoding the images", "comparing the checksums") as (images, checksums):
        report = validate(
            sources,
            max_image_pixels=config.data.max_image_pixels,
            image_size=config.data.image_size,
            threads=workers,
            progress=images,
            checksum_progress=checksums,
            sample_limit=limit,
        )
    print(render(report))
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
        except OSError as error:
            raise _not_written(json_file, error) from error
    return report.ok


def run_show(
    path: Path, overrides: Sequence[str], *, out: Path, classes: int, class_ids: Sequence[int], columns: int
) -> None:
    """Draw augmented samples of a few classes into a picture.

    Raises:
        ConfigError, DataError: the set can't be read, or the picture not be written.
    """
    out = out.expanduser()
    if (largest_side := _LONGEST_SIDE.get(out.suffix.lower())) is None:
        raise ConfigError(f"{out}: got a name that ends in {out.suffix!r}, expected .png, .jpg or .webp")
    _check_target(out)
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
        largest_side=largest_side,
    )
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise _not_written(out, error) from error
    print(f"{out}: {sheet.width} x {sheet.height} pixels")


def _open(path: Path, overrides: Sequence[str]) -> tuple[Config, Sources]:
    config = data_config(given_path(path, "a data set"), overrides)
    with progress_bar("finding the images") as progress:
        return config, build.build_sources(config, progress)


def given_path(path: Path, wanted: str) -> Path:
    """A path of the command line; what looks like an override, and isn't there, means that an argument was forgotten.

    Raises:
        ConfigError: it does.
    """
    path = path.expanduser()
    sections = "|".join(Config.model_fields)
    if re.match(rf"({sections})\.[a-z_.]+=", str(path)) and not path.exists():
        raise ConfigError(f"got {str(path)!r}, expected {wanted}: name it before what is changed in the configuration")
    return path


def _check_target(path: Path) -> None:
    """Raise a DataError unless a file can be written there. What is there stays as it is, and nothing is left."""
    there = os.path.lexists(path)
    if there and not path.is_file() and not path.is_dir():
        return  # a pipe, which would take the end of this for that of everything; or a link to nothing
    try:
        with open(path, "ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: Exception) -> DataError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else error
    return DataError(f"{path}: can't be written ({why}): name another file")
